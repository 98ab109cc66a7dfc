//! qemu, told in one way everywhere: a kernel, an initramfs, and a console.
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use super::Kernel;

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
    pub initramfs: &'a Path,
    pub accel: Accel,
    pub cpus: u8,
    pub memory_mib: u32,
    /// Where the kernel's messages, and what its first process says, go.
    pub console: PathBuf,
    /// More words for the kernel's command line; those after `--` are its first process's arguments.
    pub append: String,
    /// More arguments for qemu: devices, monitors.
    pub args: Vec<OsString>,
}

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
        command.arg("-initrd").arg(self.initramfs);
        // Each panic ends the machine, and so does what would else only be a message.
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 {}",
            self.append
        ));
        command.args(&self.args);
        command
    }
}
