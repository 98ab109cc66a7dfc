//! Running things as root, and ending them when we are ended: by a signal, or without one.
use std::{
    ffi::OsString,
    io::IsTerminal as _,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use dhcp_reclaim_tests::sandbox::{find, pidfd_open};
use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Pid, Uid},
};

/// How long a child has to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Signals that ask us to end, as something that can be polled.
pub struct Signals {
    fd: SignalFd,
    first: OnceLock<i32>,
}

impl Signals {
    /// From now on SIGINT, SIGTERM and SIGHUP are only reported here.
    pub fn catch() -> Result<Self> {
        let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        set.thread_block().context("cannot block signals")?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot catch signals")?;
        let first = OnceLock::new();
        Ok(Self { fd, first })
    }

    /// The number of the first signal that came, if one did: for everybody who asks. Of several who wait
    /// for the descriptor, one is woken.
    pub fn caught(&self) -> Option<i32> {
        if self.first.get().is_none() {
            let info = self.fd.read_signal().ok().flatten();
            let number = info.and_then(|info| i32::try_from(info.ssi_signo).ok());
            if let Some(number) = number {
                return Some(*self.first.get_or_init(|| number));
            }
        }
        self.first.get().copied()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until one of the descriptors has something to say; an interruption is not an error.
pub fn wait_any(fds: &[BorrowedFd<'_>], timeout: PollTimeout) -> Result<()> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("poll"),
    }
}

/// Runs a command as root: as it is, or through sudo.
///
/// sudo runs it in the hands of `xtask __guard`, which ends it when our end of the pipe closes:
/// that happens however we die, and a signal to us would not pass sudo otherwise.
pub fn as_root(command: &[OsString], envs: &[(&str, OsString)]) -> Result<Command> {
    if Uid::effective().is_root() {
        let [program, args @ ..] = command else {
            bail!("nothing to run");
        };
        let mut direct = Command::new(program);
        direct
            .args(args)
            .envs(envs.iter().cloned())
            .stdin(Stdio::null());
        return Ok(direct);
    }
    let sudo = find("sudo").context(
        "this step needs root (namespaces, BPF) and there is no sudo: run the same command as root",
    )?;
    let mut through = Command::new(sudo);
    through.args(["--", "env"]);
    for (key, value) in envs {
        let mut pair = OsString::from(key);
        pair.push("=");
        pair.push(value);
        through.arg(pair);
    }
    through.arg(std::env::current_exe()?).arg("__guard");
    through.args(command).stdin(Stdio::piped());
    Ok(through)
}

/// What came of a child.
pub enum End {
    Exited(ExitStatus),
    /// We were told to end; the child has been ended.
    Interrupted(i32),
}

impl End {
    pub fn code(&self) -> ExitCode {
        let code = match self {
            Self::Exited(status) => status.code().or(status.signal().map(|signal| 128 + signal)),
            Self::Interrupted(signal) => Some(128 + signal),
        };
        code.and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// A child that does not outlive us.
pub struct Guarded {
    child: Child,
    pidfd: OwnedFd,
}

impl Guarded {
    pub fn spawn(command: &mut Command) -> Result<Self> {
        die_with_parent(command);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let pidfd = pidfd_open(Pid::from_raw(child.id().cast_signed()))?;
        Ok(Self { child, pidfd })
    }

    /// Waits for its end, and ends it when a signal comes or `lifeline` closes.
    pub fn wait(mut self, signals: &Signals, lifeline: Option<BorrowedFd<'_>>) -> Result<End> {
        loop {
            let mut fds = vec![self.pidfd.as_fd(), signals.as_fd()];
            fds.extend(lifeline);
            wait_any(&fds, PollTimeout::NONE)?;
            if let Some(status) = self.child.try_wait()? {
                return Ok(End::Exited(status));
            }
            if let Some(signal) = signals.caught() {
                self.end()?;
                return Ok(End::Interrupted(signal));
            }
            if lifeline.is_some_and(closed) {
                self.end()?;
                return Ok(End::Interrupted(libc::SIGHUP));
            }
        }
    }

    /// Ends it, and returns when that is so.
    pub fn end(&mut self) -> Result<()> {
        // sudo's guard sees its pipe close; a child of our own gets the signal. sudo itself belongs
        // to root, so that signalling it is refused.
        drop(self.child.stdin.take());
        let _ = kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGTERM,
        );
        let grace = PollTimeout::try_from(GRACE).unwrap_or(PollTimeout::MAX);
        wait_any(&[self.pidfd.as_fd()], grace)?;
        if self.child.try_wait()?.is_none() {
            // Already gone is what is wanted.
            let _ = self.child.kill();
            self.child.wait()?;
        }
        Ok(())
    }
}

/// `xtask __guard COMMAND`: runs it until it ends, or until standard input does.
pub fn until_stdin_closes(command: &[OsString]) -> Result<ExitCode> {
    let [program, args @ ..] = command else {
        bail!("nothing to run");
    };
    let signals = Signals::catch()?;
    let child = Guarded::spawn(Command::new(program).args(args).stdin(Stdio::null()))?;
    let stdin = std::io::stdin();
    let lifeline = (!stdin.is_terminal()).then(|| stdin.as_fd());
    Ok(child.wait(&signals, lifeline)?.code())
}

/// Nothing is ever written into a lifeline: it can be read when its other end is closed.
fn closed(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn die_with_parent(command: &mut Command) {
    // SAFETY: both are bare system calls.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            SigSet::empty().thread_set_mask()?;
            Ok(())
        });
    }
}
