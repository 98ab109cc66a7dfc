//! qemu, told in one way everywhere: a kernel, an initramfs, and a console.
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, ensure};

use super::Kernel;
use crate::{process::Process, watch::tail};

pub const PROGRAM: &str = "qemu-system-x86_64";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Runs everywhere, slowly.
    Tcg,
    Kvm,
}

/// A machine that is to boot.
pub struct Machine<'a> {
    pub kernel: &'a Kernel,
    pub initramfs: Option<&'a Path>,
    pub accel: Accel,
    pub cpus: u8,
    pub memory_mib: u32,
    /// Where the kernel's messages, and what its first process says, go.
    pub console: PathBuf,
    /// More words for the kernel's command line, of which the last one counts; those after `--` are its
    /// first process's arguments.
    pub append: String,
    /// More arguments for qemu: devices, monitors.
    pub args: Vec<OsString>,
}

impl Accel {
    /// KVM if it is asked for and works here; else a word on standard error, and emulation. There may be
    /// a /dev/kvm that cannot run a machine, so one is booted: a kernel, which panics for want of a root.
    pub fn wanted(kvm: bool, kernel: &Kernel, dir: &Path) -> Self {
        if !kvm {
            return Self::Tcg;
        }
        match Self::Kvm.boots(kernel, dir, KVM_LIMIT) {
            Ok(()) => Self::Kvm,
            Err(error) => {
                eprintln!("warning: KVM does not work here, machines are emulated: {error:#}");
                Self::Tcg
            }
        }
    }

    /// # Errors
    ///
    /// It does not come as far as to a panic within `limit`; and why, if qemu knows.
    pub fn boots(self, kernel: &Kernel, dir: &Path, limit: Duration) -> Result<()> {
        let dir = dir.join("accel");
        let machine = Machine {
            kernel,
            initramfs: None,
            accel: self,
            cpus: 1,
            memory_mib: 512,
            console: dir.join("console.log"),
            append: String::new(),
            args: Vec::new(),
        };
        let mut qemu = Process::spawn(&dir, "qemu", &mut machine.command())?;
        let status = qemu.wait_end(limit)?;
        ensure!(status.success(), "qemu {status}: {}", tail(&qemu.log(), 3));
        let console = fs::read(&machine.console)?;
        let console = String::from_utf8_lossy(&console);
        ensure!(console.contains(PANIC), "{:?}", tail(&console, 3));
        Ok(())
    }
}

/// The last lines of a console; of a kernel that panicked, those before it and all that it said then:
/// how long its traces are is up to what was left on its stacks. What led to it may have one of its own.
pub fn last_words(console: &str, lines: usize) -> String {
    let all: Vec<_> = console.lines().collect();
    let is_panic = |line: &&str| line.contains(PANIC) && !line.contains("---[ end");
    let from = match all.iter().rposition(is_panic) {
        None => all.len().saturating_sub(lines),
        Some(panic) => {
            let before = panic.saturating_sub(TRACE);
            let is_cause = |line: &&str| CAUSES.iter().any(|cause| line.contains(cause));
            let cause = all[before..panic].iter().position(is_cause);
            let from = panic.saturating_sub(lines);
            cause.map_or(from, |at| from.min(before + at))
        }
    };
    all[from..].join("\n")
}

/// Lines that a kernel needs to tell of one thing that went wrong, at most.
const TRACE: usize = 150;
const CAUSES: [&str; 2] = ["BUG: ", "Oops: "];
const PANIC: &str = "Kernel panic - not syncing";

/// With KVM a kernel is there within two seconds.
const KVM_LIMIT: Duration = Duration::from_secs(30);

impl Machine<'_> {
    /// Not started yet. A machine that panics, is powered off or wants to reboot ends its qemu.
    pub fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-machine", "pc"]);
        match self.accel {
            Accel::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
            Accel::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        };
        command.args(["-smp", &self.cpus.to_string()]);
        command.args(["-m", &self.memory_mib.to_string()]);
        let mut console = OsString::from("file,id=console,path=");
        console.push(&self.console);
        command.arg("-chardev").arg(console);
        command.args(["-serial", "chardev:console"]);
        command.arg("-kernel").arg(&self.kernel.image);
        if let Some(initramfs) = self.initramfs {
            command.arg("-initrd").arg(initramfs);
        }
        // A panic is a reboot, which ends the machine; so does what would else only be a message.
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 {}",
            self.append
        ));
        command.args(&self.args);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_trace_does_not_hide_the_panic() {
        let said = |lines| vec!["[    2.6] ? filler+0x1/0x2"; lines].join("\n");
        let panic = "[    2.5] Kernel panic - not syncing: sysrq triggered crash";
        let console = [&said(100), panic, &said(60)].join("\n");
        let told = last_words(&console, 40);
        assert_eq!(told.lines().count(), 40 + 1 + 60);
        assert_eq!(told.lines().nth(40), Some(panic));

        let end = "[    2.7] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---";
        let ended = [&console, end].join("\n");
        assert_eq!(last_words(&ended, 40).lines().nth(40), Some(panic));

        let lockup = "[    2.4] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!";
        let long = [&said(100), lockup, &said(60), panic, &said(60)].join("\n");
        assert_eq!(last_words(&long, 40).lines().next(), Some(lockup));

        assert_eq!(last_words(panic, 40), panic);
        assert_eq!(last_words(&said(100), 40).lines().count(), 40);
    }
}
