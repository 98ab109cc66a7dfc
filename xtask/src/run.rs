//! `cargo xtask run`: from a developer's command line to the first process of a sandbox.
use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{BIN, Hook},
    boot::KernelVersion,
    guest::KERNEL,
    sandbox::{MARK, Sandbox},
    server::{Place, ServerKind},
};
use nix::{
    poll::PollTimeout,
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use serde_json::Value;

use crate::{
    cargo,
    guard::{End, Guarded, Signals, as_root, wait_any},
    setup::{self, Scope},
    vm,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    lab: LabArgs,
    /// On another kernel, in a machine booted for it: 5.10, 6.1, 6.12 or newest
    #[arg(long, value_name = "KERNEL", conflicts_with = "keep")]
    in_vm: Option<KernelVersion>,
    /// Arguments for the agent itself, which then runs on this host
    #[arg(last = true)]
    agent: Vec<OsString>,
}

#[derive(clap::Args, Clone)]
pub struct LabArgs {
    /// Which DHCP server: dnsmasq, kea or isc
    #[arg(long, default_value = "dnsmasq")]
    pub server: ServerKind,
    /// Where it is: remote (a namespace of its own), local (the node's bridge address) or libvirt (there,
    /// and run as libvirt runs dnsmasq)
    #[arg(long, default_value = "remote")]
    pub place: Place,
    /// Where the agent listens: tc or xdp
    #[arg(long, default_value = "tc")]
    pub hook: Hook,
    /// How many VMs, on a pool of as many addresses
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub vms: u8,
    /// What the VMs are: veth (a namespace with a DHCP client) or qemu (emulated machines that boot)
    #[arg(long, default_value = "veth")]
    pub guest: GuestKind,
    /// Machines with the processor's own virtualisation, if it works here: faster
    #[arg(long)]
    pub kvm: bool,
    /// Leave the lab up to play with
    #[arg(long)]
    pub keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum GuestKind {
    Veth,
    Qemu,
}

#[derive(clap::Args)]
pub struct ShellArgs {
    /// Where: node, server, vm2 and so on
    #[arg(default_value = "node")]
    place: String,
    /// What to run there, instead of a shell
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// The value of [`MARK`] in a demo's sandbox.
const DEMO: &str = "demo";
/// Inside of the sandbox: its namespaces' descriptors, written once it is to stay.
pub const KEPT: &str = "/run/lab/kept";

pub fn main(args: &Args) -> Result<ExitCode> {
    if !args.agent.is_empty() {
        return agent_on_this_host(&args.agent);
    }
    let qemu = args.lab.guest == GuestKind::Qemu;
    ensure!(
        qemu || args.in_vm.is_some() || !args.lab.kvm,
        "--kvm is for machines: add --guest qemu or --in-vm"
    );
    if let Some(version) = args.in_vm {
        ensure!(
            !qemu,
            "there is no qemu inside of a machine: leave out --in-vm or --guest"
        );
        let lab = LabArgs {
            kvm: false,
            ..args.lab.clone()
        };
        let lab = lab.to_args();
        let lab = lab.iter().map(|arg| arg.to_string_lossy().into_owned());
        return vm::demo(version, args.lab.kvm, lab.collect());
    }
    ensure!(
        kept().is_none() || !args.lab.keep,
        "a lab is up already; `cargo xtask lab-down` takes it down"
    );
    setup::ensure(if qemu { Scope::Vm } else { Scope::Lab })?;
    if qemu {
        vm::fetch(KERNEL, false)?;
    }
    let agent = cargo::build_agent()?;

    let mut command: Vec<OsString> = vec![env::current_exe()?.into(), "__lab".into()];
    command.extend(args.lab.to_args());
    let signals = Signals::catch()?;
    let mut root = as_root(&command, &[(BIN, agent.into())])?;
    Ok(Guarded::spawn(&mut root)?.wait(&signals, None)?.code())
}

/// The root side: makes the sandbox, and ends it when told to.
pub fn lab(args: &LabArgs) -> Result<ExitCode> {
    let signals = Signals::catch()?;
    let mut inner: Vec<OsString> = vec!["__demo".into()];
    inner.extend(args.to_args());
    let mark = OsStr::new(DEMO);
    let mut sandbox = Sandbox::spawn(&env::current_exe()?, &inner, &[(MARK, mark)], None)?;
    let kept = PathBuf::from(format!("/proc/{}/root{KEPT}", sandbox.pid()));
    // Only a lab that is to stay can end without its process's end.
    let tick = match args.keep {
        true => PollTimeout::from(50u16),
        false => PollTimeout::NONE,
    };
    loop {
        wait_any(&[sandbox.pidfd(), signals.as_fd()], tick)?;
        if let Some(status) = sandbox.wait(Duration::ZERO)? {
            return Ok(End::Exited(status).code());
        }
        if let Some(signal) = signals.caught() {
            sandbox.kill()?;
            return Ok(End::Interrupted(signal).code());
        }
        if kept.exists() {
            sandbox.leave();
            return Ok(ExitCode::SUCCESS);
        }
    }
}

pub fn down() -> Result<ExitCode> {
    if let Some(code) = again_as_root()? {
        return Ok(code);
    }
    let Some((pid, _)) = kept() else {
        println!("no lab is up");
        return Ok(ExitCode::SUCCESS);
    };
    let pidfd = dhcp_reclaim_tests::sandbox::pidfd_open(pid)?;
    kill(pid, Signal::SIGKILL).context("cannot end the lab")?;
    wait_any(&[pidfd.as_fd()], PollTimeout::from(10_000u16))?;
    println!("the lab is down");
    Ok(ExitCode::SUCCESS)
}

pub fn shell(args: &ShellArgs) -> Result<ExitCode> {
    if let Some(code) = again_as_root()? {
        return Ok(code);
    }
    let (pid, nets) = kept().context("no lab is up; `cargo xtask run --keep` makes one")?;
    let names: Vec<_> = nets
        .as_object()
        .map(|nets| nets.keys().cloned().collect())
        .unwrap_or_default();
    let net = nets
        .get(&args.place)
        .and_then(Value::as_u64)
        .with_context(|| {
            format!(
                "no {:?} in this lab; there are {}",
                args.place,
                names.join(", ")
            )
        })?;
    let mut command = Command::new("nsenter");
    command.args([
        format!("--target={pid}"),
        "--mount".to_owned(),
        "--pid".to_owned(),
        format!("--net=/proc/{pid}/fd/{net}"),
        "--".to_owned(),
    ]);
    match &args.command[..] {
        [] => command.arg("/bin/sh"),
        given => command.args(given),
    };
    Err(command.exec()).context("cannot run nsenter")
}

impl LabArgs {
    fn to_args(&self) -> Vec<OsString> {
        let server = match self.server {
            ServerKind::Dnsmasq => "dnsmasq",
            ServerKind::Kea => "kea",
            ServerKind::Isc => "isc",
        };
        let mut args = vec![
            "--server".into(),
            server.into(),
            "--place".into(),
            self.place.to_string().into(),
            "--hook".into(),
            self.hook.to_string().into(),
            "--vms".into(),
            self.vms.to_string().into(),
        ];
        if self.guest == GuestKind::Qemu {
            args.extend(["--guest".into(), "qemu".into()]);
        }
        if self.kvm {
            args.push("--kvm".into());
        }
        if self.keep {
            args.push("--keep".into());
        }
        args
    }
}

fn agent_on_this_host(args: &[OsString]) -> Result<ExitCode> {
    setup::ensure(Scope::Build)?;
    let agent = cargo::build_agent()?;
    // The agent is the whole of this command: signals and the terminal are its own.
    let mut command = match Uid::effective().is_root() {
        true => Command::new(agent),
        false => {
            let mut sudo = Command::new("sudo");
            sudo.arg("--").arg(agent);
            sudo
        }
    };
    Err(command.args(args).exec()).context("cannot run the agent")
}

/// The kept lab: its first process, and its namespaces' descriptors by name.
fn kept() -> Option<(Pid, Value)> {
    let mark = format!("{MARK}={DEMO}");
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        // Processes come and go; one that cannot be read is not the one.
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        if !environ
            .split(|byte| *byte == 0)
            .any(|var| var == mark.as_bytes())
        {
            continue;
        }
        let pid = entry.file_name().to_string_lossy().parse().ok()?;
        // All processes of the sandbox have the mark; its first one is that which counts.
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let first = status
            .lines()
            .any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"));
        let text = fs::read_to_string(format!("/proc/{pid}/root{KEPT}"));
        if let (true, Ok(text)) = (first, text) {
            return Some((Pid::from_raw(pid), serde_json::from_str(&text).ok()?));
        }
    }
    None
}

/// Runs this very command through sudo if that is needed to see a lab.
fn again_as_root() -> Result<Option<ExitCode>> {
    if Uid::effective().is_root() {
        return Ok(None);
    }
    let status = Command::new("sudo")
        .arg("--")
        .arg(env::current_exe()?)
        .args(env::args_os().skip(1))
        .status()
        .context("cannot run sudo")?;
    Ok(Some(End::Exited(status).code()))
}
