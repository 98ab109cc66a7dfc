//! What people order: judged by the server's own store and by the wire.
use std::{
    io::Write as _,
    net::Ipv4Addr,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_agent::store::{AuditEntry, AuditLine, OperatorEntry};
use dhcp_reclaim_tests::{
    agent::{Answer, Hook, STATE, binary},
    fixture::SERVER_IP,
    forge::{BROADCAST_MAC, Nic, arp},
    lab_test,
    sandbox::run,
    scene::Scene,
    vm::{KillKind, Station as _},
    world::PATIENCE,
};
use jiff::Timestamp;
use serde_json::Value;

/// Longer than a whole death at the settings of the lab.
const A_DEATH: Duration = Duration::from_secs(6);

fn trail() -> Result<Vec<AuditLine>> {
    let text = std::fs::read_to_string(std::path::Path::new(STATE).join("audit.jsonl"))?;
    let lines = text.lines().map(serde_json::from_str);
    Ok(lines.collect::<Result<_, _>>()?)
}

fn orders() -> Result<Vec<OperatorEntry>> {
    let lines = trail()?.into_iter();
    let order = |line| match line {
        AuditLine::Operator(entry) => Some(entry),
        AuditLine::Release(_) | AuditLine::Outcome(_) => None,
    };
    Ok(lines.filter_map(order).collect())
}

fn releases() -> Result<Vec<AuditEntry>> {
    let lines = trail()?.into_iter();
    let release = |line| match line {
        AuditLine::Release(entry) => Some(entry),
        AuditLine::Operator(_) | AuditLine::Outcome(_) => None,
    };
    Ok(lines.filter_map(release).collect())
}

/// A VM that died while the node is paused: the agent knows it.
fn dies_held(scene: &Scene, number: u8) -> Result<Ipv4Addr> {
    let (mut vm, ip) = scene.living(number)?;
    vm.die()?;
    scene
        .agent
        .wait(&format!("{ip} held by the pause"), PATIENCE, |event| {
            let reason = event.json["reason"].as_str().unwrap_or_default();
            event.name == "held" && event.ip == Some(ip) && reason.starts_with("paused: ")
        })?;
    Ok(ip)
}

/// A command on a terminal, where somebody types.
fn on_terminal(scene: &Scene, words: &str, typed: &str) -> Result<Answer> {
    let control = scene.agent.control().display();
    let line = format!("{} {words} --control {control}", binary()?.display());
    // Kept open until it has ended: the end of what is typed is no answer.
    let (reader, mut writer) = std::io::pipe()?;
    writer.write_all(typed.as_bytes())?;
    Answer::of(
        Command::new("/usr/bin/script")
            .args(["-qec", &line, "/dev/null"])
            .stdin(reader),
    )
}

lab_test! {
    fn a_pause_holds_every_release_over_a_restart_and_resume_ends_it() {
        let mut scene = Scene::new(3, &[])?;
        let said = scene.agent.ask_text(&["pause", "--reason", "moving racks"])?;
        ensure!(said.starts_with("paused since ") && said.contains("by uid 0, pid "), "{said}");
        let ip = dies_held(&scene, 1)?;
        ensure!(scene.agent.state(ip)? == "gone");
        let (verdict, reason) = scene.agent.gate(ip, "paused")?;
        ensure!(verdict == "hold" && reason.contains("moving racks"), "{reason}");
        let stats = scene.agent.ask_text(&["stats"])?;
        ensure!(stats.contains("moving racks"), "{stats}");

        // Killed, and started anew.
        let Scene { agent, wire, world } = scene;
        agent.kill();
        let agent = world.agent(Hook::Tc).quick().start()?;
        scene = Scene { agent, wire, world };
        ensure!(scene.agent.gate(ip, "paused")? == (verdict, reason));
        let other = dies_held(&scene, 2)?;
        scene.no_release_within(ip, A_DEATH)?;
        for ip in [ip, other] {
            ensure!(scene.world.server.has(ip)?, "the server's lease of {ip} is gone");
        }

        let said = scene.agent.ask_text(&["resume"])?;
        ensure!(said.starts_with("releases go on") && said.contains("moving racks"), "{said}");
        for ip in [ip, other] {
            scene.freed(ip)?;
        }
        let said = scene.agent.ask_text(&["resume"])?;
        ensure!(said.starts_with("nothing was held"), "{said}");
        scene.agent.stop()?;
        let trail = orders()?;
        let orders: Vec<_> = trail.iter().map(|entry| entry.order.as_str()).collect();
        ensure!(orders == ["pause", "resume"], "{trail:?}");
        ensure!(trail.iter().all(|entry| entry.by.uid == 0 && entry.by.pid > 1), "{trail:?}");
        ensure!(trail[0].text.as_deref() == Some("moving racks"), "{trail:?}");
        Ok(())
    }

    fn resume_closes_a_breaker_that_opened() {
        let mut scene = Scene::new(2, &["--breaker", "0.1", "--breaker-min", "0"])?;
        let (mut vm, ip) = scene.living(1)?;
        vm.die()?;
        scene.agent.wait("the breaker", PATIENCE, |event| {
            let reason = event.json["reason"].as_str().unwrap_or_default();
            event.name == "held" && event.ip == Some(ip) && reason.starts_with("breaker: ")
        })?;
        ensure!(scene.world.server.has(ip)?);
        scene.agent.wait_log("breaker open: ", PATIENCE)?;
        let stats = scene.agent.ask_text(&["stats"])?;
        ensure!(stats.contains("open since "), "{stats}");
        let said = scene.agent.ask_text(&["resume"])?;
        ensure!(said == "breaker closed\n", "{said}");
        scene.freed(ip)?;
        scene.agent.stop()
    }

    fn only_root_and_the_owner_give_orders() {
        let scene = Scene::new(2, &[])?;
        let control = scene.agent.control();
        // As for a group that may look.
        run(Command::new("/bin/chmod").arg("0666").arg(control))?;
        let ask = |args: &[&str]| -> Result<std::process::Output> {
            Command::new("/usr/bin/setpriv")
                .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
                .arg(binary()?)
                .args(args)
                .arg("--control")
                .arg(control)
                .output()
                .context("setpriv")
        };
        let list = ask(&["list", "--json"])?;
        ensure!(list.status.success(), "{list:?}");
        for order in [&["pause"][..], &["resume"]] {
            let output = ask(order)?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(1), "{output:?}");
            ensure!(text.contains("only root"), "{text}");
        }
        scene.meanwhile(1)?;
        scene.agent.stop()
    }

    fn a_vm_is_asked_and_answers_or_is_silent() {
        let slow = ["--silence", "1h", "--probe-interval", "5m", "--hold-down-silent", "1h"];
        let scene = Scene::new(2, &slow)?;
        let (mut vm, ip) = scene.living(1)?;
        let text = ip.to_string();
        let view: Value = serde_json::from_str(&scene.agent.ask_text(&["probe", &text, "--json"])?)?;
        ensure!(view["alive"] == true && view["seen_by"] == vm.name.as_str(), "{view}");
        let seen: Timestamp = serde_json::from_value(view["seen_at"].clone())?;
        let probe = scene.agent.output(&["probe", &text])?;
        ensure!(probe.code == 0 && probe.out.contains(" is alive: seen "), "{probe:?}");
        let later: Value = serde_json::from_str(&scene.agent.ask_text(&["probe", &text, "--json"])?)?;
        let later: Timestamp = serde_json::from_value(later["seen_at"].clone())?;
        ensure!(later > seen, "an old frame is no answer");

        // Its port is up, and nobody is behind it.
        vm.kill(KillKind::PortKept)?;
        let probe = scene.agent.output(&["probe", &text])?;
        ensure!(probe.code == 4 && probe.out.contains(" is silent: "), "{probe:?}");
        ensure!(scene.agent.state(ip)? == "bound", "one question is no death");
        ensure!(scene.world.server.has(ip)?);
        let nobody = scene.agent.output(&["probe", "10.9.9.9"])?;
        ensure!(nobody.code == 1 && nobody.err.contains("not known here"), "{nobody:?}");
        scene.agent.stop()
    }

    fn a_release_is_asked_for_and_the_gates_decide() {
        let scene = Scene::new(2, &["--silence", "1h", "--hold-down-silent", "1h"])?;
        let (mut vm, ip) = scene.living(1)?;
        let text = ip.to_string();
        // It lives: whatever is forced.
        let every = "confirmed,unique,hold-down,settled,paused,breaker";
        for force in [&[][..], &["--force", every, "--yes"]] {
            let asked = scene.agent.output(&[&["release", &text], force].concat())?;
            ensure!(asked.code == 4 && asked.out.contains("its VM is alive, seen "), "{asked:?}");
        }
        scene.unharmed(&vm, ip)?;

        // It is dead, and nobody has noticed: its port is up, and the hold-down is an hour.
        vm.kill(KillKind::PortKept)?;
        let asked = scene.agent.output(&["release", &text])?;
        ensure!(asked.code == 4 && asked.out.contains("hold-down  hold"), "{asked:?}");
        ensure!(!asked.out.contains("dead "), "asked and silent: {asked:?}");
        ensure!(scene.agent.state(ip)? == "silent");
        scene.unharmed(&vm, ip)?;
        scene.agent.ask_text(&["pause"])?;
        let asked = scene.agent.output(&["release", &text, "--force", "hold-down", "--yes"])?;
        ensure!(asked.code == 4 && asked.out.contains("paused  hold"), "{asked:?}");
        scene.unharmed(&vm, ip)?;

        // Without a word that it is meant, nothing is done.
        let asked = scene.agent.output(&["release", &text, "--force", "hold-down,paused"])?;
        ensure!(asked.code == 2 && asked.err.contains("--yes"), "{asked:?}");
        let asked = on_terminal(&scene, &format!("release {text} --force hold-down,paused"), "no\n")?;
        ensure!(asked.code == 1 && asked.out.contains("nothing was done"), "{asked:?}");
        scene.unharmed(&vm, ip)?;
        let asked = scene.agent.output(&["release", &text, "--force", "hold-down,paused", "--yes"])?;
        ensure!(asked.code == 0 && asked.out.contains(" is released: "), "{asked:?}");
        scene.freed(ip)?;
        let asked = scene.agent.output(&["release", &text])?;
        ensure!(asked.code == 1 && asked.err.contains("is released: nobody is asked"), "{asked:?}");
        scene.agent.wait_event("forced", ip, PATIENCE)?;
        scene.agent.stop()?;

        let audit = releases()?;
        let [entry] = &audit[..] else {
            anyhow::bail!("{audit:?}");
        };
        let order = entry.order.as_deref().unwrap_or_default();
        ensure!(order.starts_with("uid 0, pid ") && order.ends_with("overrides hold-down, paused"), "{order}");
        let forced = entry.gates.iter().filter(|gate| gate.reason.starts_with("overridden by uid 0"));
        let forced: Vec<_> = forced.map(|gate| gate.gate.as_str()).collect();
        ensure!(forced == ["hold-down", "paused"], "{entry:?}");
        let orders = orders()?;
        let last = orders.last().context("no trail")?;
        ensure!(last.text.as_deref() == Some(&*format!("{ip} --force \"hold-down,paused\": Released")), "{last:?}");
        Ok(())
    }

    fn what_is_gone_and_held_is_released_by_force_and_else_by_its_gates() {
        let scene = Scene::new(2, &["--breaker", "0.1", "--breaker-min", "0"])?;
        let (mut vm, ip) = scene.living(1)?;
        vm.die()?;
        let text = ip.to_string();
        scene.agent.wait("the breaker", PATIENCE, |event| {
            let reason = event.json["reason"].as_str().unwrap_or_default();
            event.name == "held" && event.ip == Some(ip) && reason.starts_with("breaker: ")
        })?;
        // Its port is gone: the bridge is asked, and nothing that is asked for counts.
        let counted = scene.agent.stat("core.questions_asked").unwrap_or(0);
        let probe = scene.agent.output(&["probe", &text])?;
        ensure!(probe.code == 4, "{probe:?}");
        ensure!(scene.agent.stat("core.questions_asked")? == counted + 1);
        let asked = scene.agent.output(&["release", &text])?;
        ensure!(asked.code == 4 && asked.out.contains("breaker  hold"), "{asked:?}");
        ensure!(scene.world.server.has(ip)?);
        let asked = scene.agent.output(&["release", &text, "--force", "breaker", "--yes"])?;
        ensure!(asked.code == 0, "{asked:?}");
        scene.freed(ip)?;
        scene.agent.stop()
    }

    fn who_lives_elsewhere_is_not_released_whatever_is_forced() {
        let scene = Scene::new(2, &["--hold-down-uplink", "1h", "--silence", "1h"])?;
        let (mut vm, ip) = scene.living(1)?;
        vm.die()?;
        scene.agent.wait_event("silent", ip, PATIENCE)?;
        // What it sends from another node comes in by the uplink.
        let server = &scene.world.server;
        let nic = Nic::open(server.netns(), server.place.link())?;
        let frame = arp(1, (vm.mac(), ip), (BROADCAST_MAC, SERVER_IP));
        let over = AtomicBool::new(false);
        let output = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // A link that is full has enough of them.
                    let _full = nic.send(&frame);
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let args = ["release", &ip.to_string(), "--force", "hold-down,confirmed", "--yes"];
            let output = scene.agent.output(&args);
            over.store(true, Ordering::Relaxed);
            output
        })?;
        // Found while it was asked, or before.
        ensure!([1, 4].contains(&output.code), "{output:?}");
        scene.agent.wait_event("moved", ip, PATIENCE)?;
        let releases = scene.releases(ip);
        ensure!(releases.is_empty(), "{releases:?}");
        ensure!(scene.world.server.has(ip)?);
        scene.agent.stop()
    }

    fn some_gates_cannot_be_named() {
        for gate in ["kernel", "dead", "elsewhere", "lease", "rate"] {
            let output = Command::new(binary()?)
                .args(["release", "10.0.0.1", "--yes", "--force", gate])
                .output()?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.code() == Some(2), "{output:?}");
            ensure!(text.contains(&format!("gate {gate} cannot be overridden: ")), "{text}");
        }
        Ok(())
    }
}
