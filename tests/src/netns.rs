//! Net namespaces without names: a descriptor holds one, and the kernel reaps it with the last.
use std::{
    ffi::OsStr,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

use anyhow::{Context as _, Result, anyhow};
use nix::{
    errno::Errno,
    libc,
    sched::{CloneFlags, setns, unshare},
};

use crate::sandbox::{foreign, run};

#[derive(Debug)]
pub struct NetNs(OwnedFd);

impl NetNs {
    /// A new one, with its loopback up and without IPv6's own chatter.
    pub fn new() -> Result<Self> {
        let netns = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a net namespace")?;
            Self::current()
        })?;
        netns.init()?;
        Ok(netns)
    }

    /// The one that this thread is in.
    pub fn current() -> Result<Self> {
        let file = File::open("/proc/thread-self/ns/net").context("/proc/thread-self/ns/net")?;
        Ok(Self(file.into()))
    }

    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// What every namespace of the lab starts with.
    pub fn init(&self) -> Result<()> {
        let off = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do
                       if [ -e $f ]; then echo 1 >$f; fi
                   done";
        self.shell(off)?;
        self.ip("link set lo up")
    }

    /// A command that runs in here.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let fd = self.0.as_raw_fd();
        let mut command = Command::new(program);
        // SAFETY: setns is a bare system call; the descriptor is open for as long as `self`, and a
        // command that outlives it fails to start.
        unsafe {
            command.pre_exec(move || {
                Errno::result(libc::setns(fd, libc::CLONE_NEWNET))?;
                Ok(())
            });
        }
        command
    }

    /// `ip ARGS`; several commands are separated by lines.
    pub fn ip(&self, script: &str) -> Result<()> {
        for line in script
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            run(self.command(foreign("ip")?).args(line.split_whitespace()))?;
        }
        Ok(())
    }

    pub fn shell(&self, script: &str) -> Result<String> {
        run(self.command("/bin/sh").args(["-ec", script]))
    }

    /// Runs `body` in here, on a thread of its own: for sockets.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).context("setns")?;
            body()
        })
    }

    /// Its descriptor's number in this process.
    pub fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// A path under which other processes of the sandbox find it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A thread may change its namespace without the others.
fn on_thread<T: Send>(body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(body)
            .join()
            .map_err(|_panic| anyhow!("a thread of the lab panicked"))?
    })
}
