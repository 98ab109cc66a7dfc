//! What an operator can see afterwards: the audit trail, and the logs.
use std::{fs, io::ErrorKind, net::Ipv4Addr, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_agent::core::gates::Gate;
use dhcp_reclaim_tests::{
    agent::{Hook, STATE},
    fixture::{SERVER_IP, vm_mac},
    lab_test,
    process::Process,
    sandbox::DIR,
    scene::Scene,
    server::{Place, ServerKind},
    vm::{Client, KillKind, Vm},
    watch::until,
    world::{PATIENCE, World},
};
use serde_json::Value;

/// The lines of the audit trail about `ip`; none before its first, which comes after the RELEASE.
fn audit(ip: Ipv4Addr) -> Result<Vec<Value>> {
    let path = Path::new(STATE).join("audit.jsonl");
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.with_context(|| path.display().to_string())?,
    };
    let mut lines = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        if line["ip"] == ip.to_string() {
            lines.push(line);
        }
    }
    Ok(lines)
}

fn wait_audit(ip: Ipv4Addr, count: usize) -> Result<Vec<Value>> {
    until(
        Path::new(STATE),
        PATIENCE,
        "lines of the audit trail",
        || {
            let lines = audit(ip)?;
            Ok((lines.len() >= count).then_some(lines))
        },
    )
}

lab_test! {
    fn a_release_leaves_its_whole_evidence_in_the_audit() {
        let scene = Scene::new(2, &[])?;
        let (mut vm, ip) = scene.living(1)?;
        scene.dies(&mut vm, ip)?;
        let lines = wait_audit(ip, 1)?;
        let [line] = lines.as_slice() else {
            anyhow::bail!("{lines:?}");
        };
        for (field, expected) in [
            ("audit", "release".into()),
            ("outcome", "sent".into()),
            ("verdict", "sent".into()),
            ("mac", vm_mac(1).to_string().into()),
            ("server", SERVER_IP.to_string().into()),
            ("port", "vm1".into()),
            ("port_lost", "deleted".into()),
            ("acked", Value::Bool(true)),
        ] {
            ensure!(line[field] == expected, "{field} is not {expected}: {line}");
        }
        ensure!(line["silent_for_ms"].as_u64() >= Some(1000), "{line}");
        ensure!(line["probes"].as_u64() >= Some(3), "{line}");
        let gates = line["gates"].as_array().context("no gates")?;
        ensure!(gates.len() == Gate::ALL.len(), "{line}");
        for gate in gates {
            ensure!(gate["verdict"] == "pass" && gate["reason"] != "", "{line}");
        }
        // Its next owner says what the server made of it.
        let (_next, next_ip) = scene.living(2)?;
        ensure!(next_ip == ip || audit(next_ip)?.is_empty(), "{lines:?}");
        scene.agent.stop()
    }

    fn logs_are_json_on_request_and_hide_guests_from_warnings() {
        let scene = Scene::new(2, &["--log-format", "json"])?;
        let (mut vm, ip) = scene.living(1)?;
        // Another port asks in its name: a conflict, which is a warning.
        let mut other = Vm::off(&scene.world.node, "vm9", vm.mac)?;
        scene.boot(&mut other, Client::Udhcpc)?;
        scene.agent.wait_event("conflict", ip, PATIENCE)?;
        other.kill(KillKind::PortDeleted)?;
        // Only the server's word settles it.
        vm.renew()?;
        scene.agent.wait_certain(ip, PATIENCE)?;
        scene.dies(&mut vm, ip)?;
        scene.agent.wait_event("released", ip, PATIENCE)?;
        let log = scene.agent.log();
        let mut levels = std::collections::BTreeMap::<String, Vec<Value>>::new();
        for line in log.lines() {
            let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let level = line["level"].as_str().context("no level")?.to_owned();
            levels.entry(level).or_default().push(line);
        }
        let info = levels.remove("INFO").unwrap_or_default();
        let reclaimed = info.iter().any(|line| {
            line["message"] == "released" && line["ip"] == ip.to_string()
        });
        ensure!(reclaimed, "{log}");
        let warnings = levels.remove("WARN").unwrap_or_default();
        ensure!(warnings.iter().any(|line| line["event"] == "Conflict"), "{log}");
        for line in &warnings {
            let text = line.to_string();
            let guests = text.contains(&ip.to_string()) || text.contains(&vm.mac.to_string());
            ensure!(!guests, "{text}");
        }
        scene.agent.stop()
    }

    fn the_journal_is_told_priorities() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 2)?;
        let command = world.agent(Hook::Tc).quick().command()?;
        // As systemd does it: the stream's device and inode, in the environment.
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$@\"", "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        let mut agent = Process::spawn(Path::new(DIR), "journal", &mut shell)?;
        agent.wait_log(&["ready"], PATIENCE)?;
        let log = agent.log();
        for line in log.lines() {
            ensure!(line.starts_with("<6>") || line.starts_with("<4>"), "{log}");
        }
        ensure!(log.contains("<6> INFO dhcp_reclaim_agent::agent: ready"), "{log}");
        ensure!(agent.stop(PATIENCE)?.success());
        Ok(())
    }

    fn an_audit_that_cannot_be_written_is_counted_and_stops_nothing() {
        fs::create_dir_all(STATE)?;
        // As a full disk answers.
        symlink("/dev/full", Path::new(STATE).join("audit.jsonl"))?;
        let scene = Scene::new(2, &[])?;
        for number in 1..=2 {
            let (mut vm, ip) = scene.living(number)?;
            scene.dies(&mut vm, ip)?;
        }
        scene.wait_counter("agent.audit_lost", 2)?;
        let log = scene.agent.log();
        let warned = log.matches("the audit trail cannot be written").count();
        ensure!(warned == 1, "warned {warned} times:\n{log}");
        scene.agent.stop()
    }
}
