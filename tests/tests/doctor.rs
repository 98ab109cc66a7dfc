//! Set-ups that are broken on purpose: `doctor` names each, and what it says to type mends it.
use std::{
    ffi::OsStr,
    fs,
    io::Write as _,
    net::UdpSocket,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Answer, Hook, STATE, Setup, binary},
    boot::kernel::{has_tcx, unlimit_locked_memory},
    bpf::{self, LINK_CREATE, PROG_LOAD, attributes},
    fixture::{BRIDGE, vm_mac},
    lab_test,
    node::Node,
    sandbox::{BPFFS, DIR, run, skip},
    server::Place,
    vm::Vm,
};
use nix::net::if_::if_nametoindex;
use serde::Deserialize;

const CONTROL: &str = "/run/lab/control.sock";
const PORT: &str = "vm1";

#[derive(Clone, Debug, Deserialize)]
struct Finding {
    check: String,
    health: String,
    text: String,
    mend: Option<String>,
}

/// What `doctor` says with these flags more, and how it ends.
fn doctor(more: &[&str]) -> Result<(i32, Vec<Finding>)> {
    doctor_by(Command::new(binary()?), more)
}

fn doctor_by(mut command: Command, more: &[&str]) -> Result<(i32, Vec<Finding>)> {
    command.args(["doctor", "--json", "--bpffs", BPFFS, "--state", STATE]);
    command.args(["--control", CONTROL]).args(more);
    let answer = Answer::of(&mut command)?;
    let lines = answer.out.lines().map(serde_json::from_str);
    let findings: Vec<Finding> = lines
        .collect::<Result<_, _>>()
        .with_context(|| format!("{answer:?}"))?;
    ensure!(!findings.is_empty(), "{answer:?}");
    Ok((answer.code, findings))
}

/// The only thing that is amiss.
fn amiss(found: &(i32, Vec<Finding>), check: &str, health: &str) -> Result<Finding> {
    let (code, findings) = found;
    let bad: Vec<_> = findings.iter().filter(|it| it.health != "ok").collect();
    let [bad] = &bad[..] else {
        anyhow::bail!("expected {check} alone: {bad:#?}");
    };
    ensure!(bad.check == check && bad.health == health, "{bad:?}");
    ensure!(
        *code == i32::from(health == "fail"),
        "exit code {code} for {bad:?}"
    );
    ensure!(bad.mend.is_some(), "no mend: {bad:?}");
    Ok((*bad).clone())
}

fn clean(found: &(i32, Vec<Finding>)) -> Result<()> {
    let bad: Vec<_> = found.1.iter().filter(|it| it.health != "ok").collect();
    ensure!(bad.is_empty() && found.0 == 0, "{bad:#?}");
    Ok(())
}

/// Types what was said.
fn mend(finding: &Finding) -> Result<()> {
    let line = finding.mend.as_deref().context("no mend")?;
    run(Command::new("/bin/sh").args(["-c", line])).map(drop)
}

/// A bridge with a VM's port.
fn node() -> Result<(Node, Vm)> {
    let node = Node::new()?;
    let mut vm = Vm::off(&node, PORT, vm_mac(1))?;
    vm.plug_in()?;
    Ok((node, vm))
}

const HERE: &[&str] = &["--bridge", BRIDGE];

/// Says that it is one of the programs, and does nothing: what others attach.
fn foreign(kind: u32, attach: u32, flags: u32, result: i32) -> Result<(OwnedFd, OwnedFd)> {
    let [a, b, c, d] = result.to_ne_bytes();
    // r0 = result; exit
    let code: [u8; 16] = [0xb7, 0, 0, 0, a, b, c, d, 0x95, 0, 0, 0, 0, 0, 0, 0];
    let license = c"GPL";
    let mut load = attributes(
        &[(0, kind), (4, 2)],
        &[(8, code.as_ptr() as u64), (16, license.as_ptr() as u64)],
    );
    load[48..55].copy_from_slice(b"foreign");
    // SAFETY: the code has two instructions, and the license its end; both live.
    let program = unsafe { bpf::open(PROG_LOAD, &load) }?;
    let fd = program.as_raw_fd().cast_unsigned();
    let words = [
        (0, fd),
        (4, if_nametoindex(PORT)?),
        (8, attach),
        (12, flags),
    ];
    // SAFETY: no pointers.
    let link = unsafe { bpf::open(LINK_CREATE, &attributes(&words, &[])) }?;
    Ok((program, link))
}

lab_test! {
    fn a_healthy_node_is_clean_with_an_agent_and_without() {
        let (_node, _vm) = node()?;
        clean(&doctor(HERE)?)?;
        // Without a name it looks at the bridges that are here.
        let found = doctor(&[])?;
        clean(&found)?;
        ensure!(found.1.iter().any(|it| it.text.contains(&format!("--bridge {BRIDGE}"))), "{found:?}");
        ensure!(!Path::new(STATE).exists() && !Path::new(CONTROL).exists(), "it changed something");
        let setup = Setup::new(Place::Local, Hook::Tc);
        let agent = setup.start()?;
        let found = doctor(HERE)?;
        clean(&found)?;
        ensure!(found.1.iter().any(|it| it.check == "agent" && it.text.starts_with("runs here: ")), "{found:?}");
        // For people: no line is wider than a terminal, and no colour where there is none.
        let mut command = Command::new(binary()?);
        command.args(["doctor", "--bpffs", BPFFS, "--state", STATE, "--control", CONTROL]).args(HERE);
        let answer = Answer::of(&mut command)?;
        ensure!(answer.code == 0 && answer.out.ends_with("nothing to mend\n"), "{answer:?}");
        ensure!(answer.out.lines().all(|line| line.len() <= 80), "{}", answer.out);
        ensure!(!answer.out.contains('\u{1b}'), "{answer:?}");
        agent.stop()
    }

    fn no_bpf_file_system() {
        let (_node, _vm) = node()?;
        let flags = [HERE, &["--bpffs", "/run/lab/nothing"]].concat();
        let found = amiss(&doctor(&flags)?, "bpffs", "fail")?;
        mend(&found)?;
        clean(&doctor(&flags)?)?;
        fs::create_dir("/run/lab/plain")?;
        let flags = [HERE, &["--bpffs", "/run/lab/plain"]].concat();
        let found = amiss(&doctor(&flags)?, "bpffs", "fail")?;
        ensure!(found.text.contains("is no BPF file system"), "{found:?}");
        mend(&found)?;
        clean(&doctor(&flags)?)
    }

    fn a_capability_is_missing() {
        let (_node, _vm) = node()?;
        let mut command = Command::new("/usr/bin/setpriv");
        command.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"]).arg(binary()?);
        let found = amiss(&doctor_by(command, HERE)?, "capabilities", "fail")?;
        ensure!(found.text.contains("CAP_NET_RAW (send probes and RELEASEs)"), "{found:?}");
        ensure!(found.mend.as_deref().is_some_and(|mend| mend.starts_with("sudo ")), "{found:?}");
        Ok(())
    }

    fn a_bridge_that_is_not_there_or_down_or_none() {
        let (node, _vm) = node()?;
        let found = amiss(&doctor(&["--bridge", "br7"])?, "bridge", "warn")?;
        ensure!(found.mend.as_deref() == Some("name one that is here: --bridge br0"), "{found:?}");
        let found = amiss(&doctor(&["--bridge", PORT])?, "bridge", "fail")?;
        ensure!(found.text.contains("is no Linux bridge, but veth"), "{found:?}");
        node.netns.ip(&format!("link set {BRIDGE} down"))?;
        let found = amiss(&doctor(HERE)?, "bridge", "fail")?;
        ensure!(found.text.contains("is down"), "{found:?}");
        mend(&found)?;
        clean(&doctor(HERE)?)
    }

    fn vms_that_pass_every_bridge_by() {
        let (node, _vm) = node()?;
        node.netns.ip(
            "link add wire0 type veth peer name wire1
             link add link wire0 name guest0 type macvtap mode passthru",
        )?;
        let found = amiss(&doctor(HERE)?, "macvtap", "warn")?;
        ensure!(found.text.contains("guest0 is a macvtap in passthrough mode"), "{found:?}");
        node.netns.ip("link del guest0")?;
        clean(&doctor(HERE)?)?;

        node.netns.ip("tuntap add guest1 mode tap")?;
        let found = amiss(&doctor(HERE)?, "tap", "warn")?;
        let line = found.mend.as_deref().context("no mend")?.replace("BRIDGE", BRIDGE);
        node.netns.ip(line.strip_prefix("ip ").context("no command of ip(8)")?)?;
        clean(&doctor(HERE)?)?;

        let mut qemu = Command::new("/bin/sh")
            .arg0("/usr/bin/qemu-system-x86_64")
            .args(["-c", "read line", "sh", "-netdev", "type=vhost-user,id=net0"])
            .stdin(Stdio::piped())
            .spawn()?;
        let found = amiss(&doctor(HERE)?, "vhost-user", "warn")?;
        ensure!(found.text.starts_with("qemu-system-x86_64 has "), "{found:?}");
        qemu.stdin.take().context("no pipe")?.write_all(b"\n")?;
        qemu.wait()?;
        clean(&doctor(HERE)?)
    }

    fn an_xdp_program_in_front_of_ours() {
        let (_node, _vm) = node()?;
        const XDP: (u32, u32) = (6, 37);
        const GENERIC: u32 = 1 << 1;
        unlimit_locked_memory()?;
        let (program, link) = foreign(XDP.0, XDP.1, GENERIC, 2)?;
        let found = amiss(&doctor(HERE)?, "port", "warn")?;
        ensure!(found.text.contains("vm1 has an XDP program"), "{found:?}");
        ensure!(found.mend.as_deref() == Some("ip link set dev vm1 xdp off"), "{found:?}");
        drop((program, link));
        clean(&doctor(HERE)?)
    }

    fn a_tcx_program_in_front_of_ours() {
        const TCX: (u32, u32) = (3, 46);
        const BEFORE: u32 = 1 << 3;
        if !has_tcx()? {
            return skip("tcx comes with Linux 6.6");
        }
        let (_node, _vm) = node()?;
        unlimit_locked_memory()?;
        let agent = Setup::new(Place::Local, Hook::Tc).start()?;
        let (program, link) = foreign(TCX.0, TCX.1, BEFORE, -1)?;
        let found = amiss(&doctor(HERE)?, "port", "warn")?;
        ensure!(found.text.contains("vm1 has foreign in front of ours"), "{found:?}");
        drop((program, link));
        clean(&doctor(HERE)?)?;
        agent.stop()
    }

    fn a_configuration_that_cannot_be_used() {
        let (_node, _vm) = node()?;
        let path = Path::new(DIR).join("agent.toml");
        let flags = ["--config", path.to_str().context("no text")?];
        let absent = doctor(&flags)?;
        let found = amiss(&absent, "configuration", "fail")?;
        ensure!(found.text.contains("cannot read"), "{found:?}");
        for (text, part) in [
            ("bridge = [\"br0\"]\nhold-up = \"2s\"\n", "agent.toml:2:"),
            ("bridge = [\"br0\"]\nmisses = 0\n", "agent.toml:2: `misses`"),
            ("bridge = \n", "agent.toml:1:"),
        ] {
            fs::write(&path, text)?;
            let found = amiss(&doctor(&flags)?, "configuration", "fail")?;
            ensure!(found.text.contains(part), "{found:?}");
        }
        fs::write(&path, "bridge = [\"br0\"]\n")?;
        clean(&doctor(&flags)?)
    }

    fn a_control_path_that_is_no_socket() {
        let (_node, _vm) = node()?;
        fs::write(CONTROL, "precious")?;
        let found = amiss(&doctor(HERE)?, "control", "fail")?;
        ensure!(found.text.contains("is no socket"), "{found:?}");
        run(Command::new("/bin/rm").arg(CONTROL))?;
        clean(&doctor(HERE)?)?;
        let agent = Setup::new(Place::Local, Hook::Tc).start()?;
        run(Command::new("/bin/chmod").args(["666", CONTROL]))?;
        let found = amiss(&doctor(HERE)?, "control", "warn")?;
        mend(&found)?;
        clean(&doctor(HERE)?)?;
        agent.stop()
    }

    fn a_filter_between_the_agent_and_the_bridge() {
        let (node, _vm) = node()?;
        let chain = "{ type filter hook output priority 0; policy drop; }";
        for line in [
            "add table bridge guard".to_owned(),
            format!("add chain bridge guard leaving {chain}"),
            "add chain bridge guard jumped_to".to_owned(),
        ] {
            node.netns.shell(&format!("nft '{line}'"))?;
        }
        let found = amiss(&doctor(HERE)?, "bridge-filter", "warn")?;
        let told = found.mend.as_deref().unwrap_or_default();
        ensure!(told.ends_with("nft list chain bridge guard leaving"), "{found:?}");
        node.netns.shell("nft delete table bridge guard")?;
        clean(&doctor(HERE)?)
    }

    fn a_state_folder_that_cannot_be_written() {
        let (_node, _vm) = node()?;
        fs::create_dir("/run/lab/disk")?;
        run(Command::new("/bin/mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs", "/run/lab/disk"]))?;
        let flags = [HERE, &["--state", "/run/lab/disk/state"]].concat();
        let found = amiss(&doctor(&flags)?, "state", "fail")?;
        ensure!(found.text.contains("is mounted read-only"), "{found:?}");
        mend(&found)?;
        clean(&doctor(&flags)?)?;
        fs::create_dir("/run/lab/disk/state")?;
        run(Command::new("/bin/chmod").args(["755", "/run/lab/disk/state"]))?;
        let found = amiss(&doctor(&flags)?, "state", "warn")?;
        mend(&found)?;
        clean(&doctor(&flags)?)?;
        run(Command::new("/bin/mount").args(["-o", "remount,size=1M", "/run/lab/disk"]))?;
        let found = amiss(&doctor(&flags)?, "state", "warn")?;
        ensure!(found.text.contains("has room for "), "{found:?}");
        Ok(())
    }

    fn another_agent_has_the_node() {
        let (_node, _vm) = node()?;
        let agent = Setup::new(Place::Local, Hook::Tc).control("/run/lab/other.sock").start()?;
        let (code, findings) = doctor(HERE)?;
        let bad: Vec<_> = findings.iter().filter(|it| it.health != "ok").collect();
        ensure!(code == 1 && bad.len() == 2, "its state and its pins: {bad:#?}");
        let process = format!("process {}", agent.pid());
        for finding in bad {
            ensure!(finding.check == "agent" && finding.text.contains(&process), "{finding:?}");
            ensure!(finding.mend.as_deref().is_some_and(|mend| mend.starts_with("stop that one")), "{finding:?}");
        }
        agent.stop()?;
        clean(&doctor(HERE)?)
    }

    fn the_port_for_lease_queries_is_taken() {
        let (node, _vm) = node()?;
        node.netns.ip(&format!("addr add 10.67.0.9/24 dev {BRIDGE}"))?;
        clean(&doctor(HERE)?)?;
        let server = UdpSocket::bind("0.0.0.0:67")?;
        let found = amiss(&doctor(HERE)?, "leasequery", "warn")?;
        ensure!(found.text.contains("port 67 of 10.67.0.9 is taken"), "{found:?}");
        clean(&doctor(&[HERE, &["--leasequery", "off"]].concat())?)?;
        drop(server);
        clean(&doctor(HERE)?)
    }

    fn without_an_agent_the_others_say_so_in_a_line() {
        for words in [
            &["list"][..],
            &["list", "--json"],
            &["stats"],
            &["explain", "10.0.0.1"],
            &["events"],
            &["probe", "10.0.0.1"],
            &["release", "10.0.0.1"],
            &["pause"],
            &["resume"],
        ] {
            let mut command = Command::new(binary()?);
            command.args(words).args([OsStr::new("--control"), OsStr::new("/run/lab/none.sock")]);
            let answer = Answer::of(&mut command)?;
            ensure!(answer.code == 3 && answer.out.is_empty(), "{words:?}: {answer:?}");
            let text = "dhcp-reclaim: no agent is running here (control socket /run/lab/none.sock)\n";
            ensure!(answer.err == text, "{words:?}: {answer:?}");
        }
        Ok(())
    }
}
