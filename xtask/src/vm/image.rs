//! What is inside of a machine under test: the lab's programs, the tests, and nothing else.
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use dhcp_reclaim_tests::{
    boot::{Initramfs, Kernel},
    sandbox::{find, run},
};

use super::guest::{PLAN, Plan};
use crate::cargo;

/// Where cargo's programs are in there.
const PROGRAMS: &str = "/programs";

/// The first process: this very program.
pub const INIT: &str = "/programs/xtask";

/// What tests call, also by way of what they call.
const TOOLS: &[&str] = &[
    "arping",
    "bpftool",
    "busybox",
    "bridge",
    "cat",
    "chmod",
    "chown",
    "cp",
    "dhclient",
    "dhcp_release",
    "dhcpcd",
    "dhcpd",
    "dhcrelay",
    "dnsmasq",
    "ethtool",
    "false",
    "grep",
    "ip",
    "kea-dhcp4",
    "ls",
    "mkdir",
    "mount",
    "mv",
    "nft",
    "nsenter",
    "rm",
    "script",
    "setpriv",
    "sh",
    "sleep",
    "stat",
    "tc",
    "touch",
    "udhcpc",
    "unshare",
];

/// Those without which a test says that it skips.
const OPTIONAL: &[&str] = &["/usr/lib/systemd/systemd-networkd"];

/// Users and names that servers look up.
const ETC: &[&str] = &[
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/protocols",
    "/etc/services",
    "/etc/hosts",
];

const MACHINE_ID: &str = "d0d0cafed0d0cafed0d0cafed0d0cafe\n";

/// A kernel of a distribution has as modules what the lab is made of.
const MODULES: &[&str] = &[
    "veth",
    "bridge",
    "tun",
    "8021q",
    "sch_ingress",
    "cls_bpf",
    "sch_netem",
    "dummy",
    "macvtap",
    "nf_tables",
];

/// Everything but the kernel's modules and the plan, which are added for each kernel.
pub struct Userland {
    initramfs: Initramfs,
    stripped: PathBuf,
}

impl Userland {
    pub fn new() -> Result<Self> {
        let mut initramfs = Initramfs::new()?;
        for tool in TOOLS {
            initramfs.program(tool)?;
        }
        for tool in OPTIONAL.iter().filter(|tool| Path::new(tool).exists()) {
            initramfs.copy(Path::new(tool))?;
            initramfs.libraries(Path::new(tool))?;
        }
        for file in ETC.iter().filter(|file| Path::new(file).exists()) {
            initramfs.copy(Path::new(file))?;
        }
        // Clients that name themselves by it want one.
        initramfs.file(Path::new("/etc/machine-id"), 0o444, MACHINE_ID);
        let stripped = cargo::root().join("target/vm/programs");
        fs::create_dir_all(&stripped)?;
        let mut this = Self {
            initramfs,
            stripped,
        };
        this.built(&env::current_exe()?, "xtask")?;
        Ok(this)
    }

    /// Adds a program that cargo built, under a name of its own, and returns where it is in there.
    /// Debug information would be nine tenths of the machine's memory.
    pub fn built(&mut self, program: &Path, name: &str) -> Result<String> {
        let stripped = self.stripped.join(name);
        let strip = find("strip").context("there is no `strip` (binutils)")?;
        run(Command::new(strip)
            .arg("--strip-debug")
            .arg("-o")
            .arg(&stripped)
            .arg(program))?;
        self.initramfs.libraries(program)?;
        let path = format!("{PROGRAMS}/{name}");
        self.initramfs.copy_as(&stripped, Path::new(&path))?;
        Ok(path)
    }

    /// What tests read of a folder of this workspace, where it is.
    pub fn folder(&mut self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
            let entry = entry?;
            let code = ["src", "target"]
                .iter()
                .any(|name| entry.file_name() == *name);
            match entry.file_type()?.is_dir() {
                true if code => {}
                true => self.folder(&entry.path())?,
                false => self.initramfs.copy(&entry.path())?,
            }
        }
        Ok(())
    }

    /// The archive for one kernel and one plan.
    pub fn write(&self, kernel: &Kernel, plan: &Plan, path: &Path) -> Result<()> {
        let mut initramfs = self.initramfs.clone();
        for module in MODULES {
            initramfs.module(kernel, module)?;
        }
        initramfs.file(Path::new(PLAN), 0o644, serde_json::to_vec(plan)?);
        initramfs.write(path)
    }
}
