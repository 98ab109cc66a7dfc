//! A process, stopped at its system calls: how a test kills it at a place of its choice.
use anyhow::{Result, bail};
use nix::{
    libc,
    sys::{
        ptrace::{self, Options},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// Holds one thread of a child. When it is dropped, the child stays as it is.
pub struct Tracer {
    pid: Pid,
}

/// A system call, as the process enters or leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// `SYS_*`; -1 when it leaves.
    pub number: libc::c_long,
    pub args: [u64; 6],
}

impl Tracer {
    /// To be used by this thread only.
    pub fn seize(pid: Pid) -> Result<Self> {
        ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD)?;
        ptrace::interrupt(pid)?;
        Self::wait(pid)?;
        Ok(Self { pid })
    }

    /// Lets it run to its next system call, or to the end of the one that it is in.
    pub fn step(&mut self) -> Result<Call> {
        let mut signal = None;
        loop {
            ptrace::syscall(self.pid, signal)?;
            match Self::wait(self.pid)? {
                WaitStatus::PtraceSyscall(_) => return self.call(),
                WaitStatus::Stopped(_, stop) => signal = Some(stop),
                WaitStatus::PtraceEvent(..) => signal = None,
                other => bail!("the traced process: {other:?}"),
            }
        }
    }

    fn call(&self) -> Result<Call> {
        let info = ptrace::syscall_info(self.pid)?;
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return Ok(Call {
                number: -1,
                args: [0; 6],
            });
        }
        // SAFETY: `op` says that it is this one.
        let entry = unsafe { info.u.entry };
        Ok(Call {
            number: entry.nr.cast_signed(),
            args: entry.args,
        })
    }

    fn wait(pid: Pid) -> Result<WaitStatus> {
        Ok(waitpid(pid, Some(WaitPidFlag::__WALL))?)
    }
}
