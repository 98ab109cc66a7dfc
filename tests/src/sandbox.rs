//! A process tree with its own pid, mount and net namespaces, which the kernel reaps as a whole.
//!
//! The first process of a pid namespace takes everything with it when it dies: every process, the
//! unnamed net namespaces that they hold, their links, and with the mount namespace its tmpfs and
//! bpffs. It dies with the thread that made it, so even `kill -9` of that leaves nothing behind.
use std::{
    env,
    ffi::{CString, OsStr, OsString},
    fs,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, process::ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::CloneFlags,
    sys::{
        signal::{SigSet, SigmaskHow, Signal, pthread_sigmask},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, Uid},
};

use crate::clock::{Deadline, scaled};

/// Set for the first process of a sandbox; its value tells one sandbox from another.
pub const MARK: &str = "DHCP_RECLAIM_LAB";

/// Everything that the lab writes: a tmpfs that goes with the sandbox.
pub const DIR: &str = "/run/lab";
/// A bpffs of the sandbox's own.
pub const BPFFS: &str = "/run/lab/bpf";

/// The outside's hold on a sandbox. Dropping it ends the sandbox.
pub struct Sandbox {
    init: Pid,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

impl Sandbox {
    /// Starts `program` as the first process of a new sandbox. It must call [`enter`] first.
    ///
    /// The sandbox dies with the calling *thread*.
    pub fn spawn<A: AsRef<OsStr>>(
        program: &Path,
        args: &[A],
        envs: &[(&str, &OsStr)],
        output: Option<OwnedFd>,
    ) -> Result<Self> {
        ensure!(Uid::effective().is_root(), "a lab needs root");
        let path = CString::new(program.as_os_str().as_bytes())?;
        let mut argv = vec![path.clone()];
        for arg in args {
            argv.push(CString::new(arg.as_ref().as_bytes())?);
        }
        let envp = environment(envs)?;
        let argv_pointers = pointers(&argv);
        let envp_pointers = pointers(&envp);
        let parent = pidfd_open(Pid::this())?;

        let flags = CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC;
        let no_args: libc::c_long = 0;
        // SAFETY: without CLONE_VM and with a null stack this is fork(): the child gets a copy of
        // everything, and until it calls execve it does nothing but system calls.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone,
                libc::c_long::from(flags.bits() | libc::SIGCHLD),
                no_args,
                no_args,
                no_args,
                no_args,
            )
        };
        if pid == 0 {
            let output = output.as_ref().map(|fd| fd.as_raw_fd());
            exec_in_child(
                &path,
                &argv_pointers,
                &envp_pointers,
                parent.as_raw_fd(),
                output,
            );
        }
        let pid = Errno::result(pid).context("cannot make namespaces (clone)")?;
        let init = Pid::from_raw(pid.try_into().context("pid out of range")?);
        Ok(Self {
            init,
            pidfd: pidfd_open(init)?,
            status: None,
        })
    }

    pub fn pid(&self) -> Pid {
        self.init
    }

    /// Readable once the sandbox has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for the end, `None` if it does not come in time.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Deadline::after(timeout);
        while self.status.is_none() {
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            let left = PollTimeout::try_from(deadline.left()).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, left) {
                Ok(0) if deadline.passed() => return Ok(None),
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => self.reap()?,
                Err(error) => return Err(error).context("poll on a sandbox"),
            }
        }
        Ok(self.status)
    }

    /// Ends every process of the sandbox, and returns when the last is gone.
    pub fn kill(&mut self) -> Result<()> {
        if self.status.is_none() {
            pidfd_kill(&self.pidfd)?;
            self.reap()?;
        }
        Ok(())
    }

    /// Leaves the sandbox to itself; it must have called [`outlive_parent`].
    pub fn leave(mut self) {
        self.status = Some(ExitStatus::default());
    }

    fn reap(&mut self) -> Result<()> {
        // The kernel reports the end of a pid namespace's first process only after all others.
        let status = loop {
            match waitpid(self.init, Some(WaitPidFlag::empty())) {
                Err(Errno::EINTR) => continue,
                other => break other.context("wait for a sandbox")?,
            }
        };
        self.status = Some(match status {
            WaitStatus::Exited(_, code) => ExitStatus::from_raw(code << 8),
            WaitStatus::Signaled(_, signal, _) => ExitStatus::from_raw(signal as i32),
            other => bail!("unexpected state of a sandbox: {other:?}"),
        });
        Ok(())
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Already gone is what is wanted; there is nobody left to tell anything else.
        let _ = self.kill();
    }
}

/// Whether this process is the first one of a sandbox.
pub fn inside() -> bool {
    env::var_os(MARK).is_some() && Pid::this().as_raw() == 1
}

/// Makes the new namespaces a home: private mounts, a fresh `/proc`, `/sys` and `/run`, a bpffs.
pub fn enter() -> Result<()> {
    ensure!(inside(), "not the first process of a sandbox");
    mount_one("none", "/", "", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_one("proc", "/proc", "proc", plain | MsFlags::MS_NOEXEC)?;
    // A sysfs shows the links of the net namespace that it was mounted from.
    mount_one("sysfs", "/sys", "sysfs", plain | MsFlags::MS_NOEXEC)?;
    mount_one("bpf", "/sys/fs/bpf", "bpf", plain)?;
    mount_one("tmpfs", "/run", "tmpfs", plain)?;
    fs::create_dir_all(BPFFS).context(BPFFS)?;
    mount_one("bpf", BPFFS, "bpf", plain)?;
    nix::unistd::sethostname("node").context("sethostname")?;
    // The mask of whoever started us is no part of the lab; servers end by SIGTERM.
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
        .context("cannot clear the signal mask")?;
    Ok(())
}

/// From here on the sandbox lives until somebody kills its first process.
pub fn outlive_parent() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(None::<Signal>).context("prctl")
}

/// Runs `body` in a sandbox of its own: how a test owns its world.
///
/// The test binary runs itself again for this one test, as the first process of a sandbox.
pub fn test_in_world(
    module: &str,
    name: &str,
    timeout: Duration,
    body: impl FnOnce() -> Result<()>,
) {
    let path = module
        .split_once("::")
        .map_or(name.to_owned(), |(_, module)| format!("{module}::{name}"));
    if inside() {
        run_here(&path, body);
        return;
    }
    if !Uid::effective().is_root() {
        println!("SKIP {path}: needs root");
        return;
    }
    run_again(&path, timeout).unwrap_or_else(|error| panic!("{path}: {error:#}"));
}

/// Ends a test without a verdict: `return skip("why")`.
pub fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(Skip(reason.into()).into())
}

#[derive(Debug)]
struct Skip(String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

fn run_here(path: &str, body: impl FnOnce() -> Result<()>) {
    // libtest has begun a line with this test's name. What the test says of itself is read by lines.
    println!();
    let Err(error) = enter().and_then(|()| body()) else {
        return;
    };
    if let Some(Skip(reason)) = error.downcast_ref() {
        println!("\nSKIP {path}: {reason}");
        return;
    }
    panic!("{error:#}");
}

fn run_again(path: &str, timeout: Duration) -> Result<()> {
    use std::io::{BufRead as _, BufReader};

    let timeout = scaled(timeout);
    let (reader, writer) = std::io::pipe().context("pipe")?;
    let mut args: Vec<OsString> = [path, "--exact", "--nocapture", "--test-threads=1"]
        .map(OsString::from)
        .to_vec();
    // An ignored test was asked for by name if it runs at all.
    args.push("--include-ignored".into());
    let mark = OsString::from(format!("{}-{path}", std::process::id()));
    let mut sandbox = Sandbox::spawn(
        &env::current_exe()?,
        &args,
        // The error says what happened where; a backtrace would only hide it.
        &[(MARK, &mark), ("RUST_BACKTRACE", OsStr::new("0"))],
        Some(writer.into()),
    )?;
    let pidfd = sandbox.pidfd.try_clone()?;
    // Its output ends when its last process does; a guard ends it if it takes too long.
    let (done, guard) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        let late = guard.recv_timeout(timeout) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late {
            let _ = pidfd_kill(&pidfd);
        }
        late
    });
    for line in BufReader::new(reader).split(b'\n') {
        println!("{}", String::from_utf8_lossy(&line?));
    }
    let _ = done.send(());
    sandbox.wait(Duration::from_secs(30))?;
    let late = guard.join().unwrap_or(false);
    ensure!(!late, "still running after {timeout:?}");
    let status = sandbox.status.context("did not end")?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// A foreign program, copied into the sandbox: a host's AppArmor profile is bound to its path, and
/// would keep it from the lab's files.
pub fn foreign(program: &str) -> Result<PathBuf> {
    // One copies it, and whoever else wants it waits.
    static COPYING: Mutex<()> = Mutex::new(());
    let _turn = COPYING.lock().unwrap_or_else(PoisonError::into_inner);
    let copy = Path::new(DIR).join("bin").join(program);
    if copy.exists() {
        return Ok(copy);
    }
    let found = find(program).with_context(|| {
        format!("{program} is not installed; `cargo xtask setup` installs what the lab needs")
    })?;
    fs::create_dir_all(copy.with_file_name(""))?;
    let fresh = copy.with_extension("new");
    fs::copy(&found, &fresh).with_context(|| format!("cannot copy {}", found.display()))?;
    fs::rename(&fresh, &copy)?;
    Ok(copy)
}

/// The filters on one way (`ingress`, `egress`) of a port's clsact.
pub fn filters(port: &str, way: &str) -> Result<usize> {
    let mut tc = Command::new(foreign("tc")?);
    let list = run(tc.args(["filter", "show", "dev", port, way]))?;
    Ok(list
        .lines()
        .filter(|line| line.contains(" handle "))
        .count())
}

/// Where a program is, also outside of a user's PATH.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Runs a command to its end; its output is the error if it fails.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim(),
        String::from_utf8_lossy(&output.stdout).trim(),
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn exec_in_child(
    path: &CString,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
    parent: i32,
    output: Option<i32>,
) -> ! {
    // SAFETY: only async-signal-safe calls on values that were made before the fork; `argv` and
    // `envp` end with a null pointer.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // The parent may have died before that: its pidfd is readable then.
        let mut parent = libc::pollfd {
            fd: parent,
            events: libc::POLLIN,
            revents: 0,
        };
        if libc::poll(&raw mut parent, 1, 0) != 0 {
            libc::_exit(125);
        }
        // Ctrl-C is for whoever waits for us; they end us.
        libc::setsid();
        if let Some(fd) = output {
            libc::dup2(fd, 1);
            libc::dup2(fd, 2);
        }
        libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr());
        libc::_exit(126)
    }
}

fn environment(extra: &[(&str, &OsStr)]) -> Result<Vec<CString>> {
    let inherited = env::vars_os().filter(|(key, _)| !extra.iter().any(|(name, _)| *name == key));
    let added = extra
        .iter()
        .map(|(key, value)| (OsString::from(key), value.to_os_string()));
    inherited
        .chain(added)
        .map(|(mut key, value)| {
            key.push("=");
            key.push(value);
            CString::new(key.as_bytes()).context("NUL in the environment")
        })
        .collect()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// A descriptor that means this process, also once its number belongs to another.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: takes and returns integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = Errno::result(fd).context("pidfd_open")?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.try_into()?) })
}

fn pidfd_kill(pidfd: &OwnedFd) -> Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means the same as kill(2).
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            no_info,
            0,
        )
    };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).context("pidfd_send_signal"),
    }
}

fn mount_one(source: &str, target: &str, kind: &str, flags: MsFlags) -> Result<()> {
    mount(Some(source), target, Some(kind), flags, None::<&str>)
        .with_context(|| format!("cannot mount {kind} on {target}"))
}
