//! What people see: tables that fit, in the order that was asked for, and colour on terminals only.
use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Answer, binary},
    lab_test,
    scene::Scene,
    vm::Station as _,
};

const ESCAPE: char = '\u{1b}';

/// The first column of a table.
fn first(text: &str) -> Vec<&str> {
    let rows = text.lines().skip(1);
    rows.filter_map(|row| row.split_whitespace().next())
        .collect()
}

/// The same command, on a terminal.
fn on_terminal(scene: &Scene, words: &str, no_color: &str) -> Result<String> {
    let line = format!(
        "{} {words} --control {}",
        binary()?.display(),
        scene.agent.control().display()
    );
    let mut command = Command::new("/usr/bin/script");
    command.args(["-qec", &line, "/dev/null"]);
    command.env("TERM", "xterm").env("NO_COLOR", no_color);
    let answer = Answer::of(command.stdin(Stdio::null()))?;
    ensure!(answer.code == 0, "{answer:?}");
    Ok(answer.out)
}

lab_test! {
    fn lists_sort_choose_fit_and_have_colour_on_terminals_only() {
        let scene = Scene::new(3, &["--hold-down-uplink", "5m"])?;
        let (_one, ip1) = scene.living(1)?;
        let (_two, ip2) = scene.living(2)?;
        let (mut three, ip3) = scene.living(3)?;
        three.die()?;
        scene.agent.wait_event("silent", ip3, dhcp_reclaim_tests::world::PATIENCE)?;
        let [ip1, ip2, ip3] = [ip1, ip2, ip3].map(|ip| ip.to_string());

        let by_port = scene.agent.ask_text(&["list", "--sort", "port"])?;
        ensure!(first(&by_port) == [&ip1, &ip2, &ip3], "{by_port}");
        let by_mac = scene.agent.ask_text(&["list", "--sort", "mac"])?;
        ensure!(first(&by_mac) == [&ip1, &ip2, &ip3], "{by_mac}");
        let by_ip = scene.agent.ask_text(&["list"])?;
        let mut ips = [&ip1, &ip2, &ip3];
        ips.sort_by_key(|ip| ip.parse::<std::net::Ipv4Addr>().ok());
        ensure!(first(&by_ip) == ips, "{by_ip}");
        let silent = scene.agent.ask_text(&["list", "--state", "silent,gone"])?;
        ensure!(first(&silent) == [&ip3], "{silent}");
        let chosen = scene.agent.ask_text(&["list", "--port", "vm1", "--port", "*2"])?;
        ensure!(first(&chosen).len() == 2, "{chosen}");
        let chosen = scene.agent.ask_text(&["list", "--port", "vm2"])?;
        ensure!(first(&chosen) == [&ip2], "{chosen}");
        let none = scene.agent.output(&["list", "--port", "tap*"])?;
        ensure!(none.code == 0 && none.out.is_empty() && none.err == "no such leases\n", "{none:?}");
        let wrong = scene.agent.output(&["list", "--state", "dead"])?;
        ensure!(wrong.code == 2 && wrong.err.contains("possible values"), "{wrong:?}");

        let explained = scene.agent.ask_text(&["explain", &ip3])?;
        let stats = scene.agent.ask_text(&["stats"])?;
        for text in [&by_ip, &silent, &explained, &stats] {
            ensure!(!text.contains(ESCAPE), "colour without a terminal: {text}");
        }
        let wide = |text: &str| text.lines().any(|line| line.chars().count() > 80);
        ensure!(!wide(&by_ip), "{by_ip}");
        ensure!(on_terminal(&scene, "list", "")?.contains("\u{1b}[32mbound"), "no colour");
        ensure!(!on_terminal(&scene, "list", "1")?.contains(ESCAPE), "colour with NO_COLOR");

        // What holds every release is said with the list, and is no part of the table.
        scene.agent.ask_text(&["pause", "--reason", "moving racks"])?;
        let held = scene.agent.output(&["list"])?;
        ensure!(held.err.contains("moving racks") && !held.out.contains("racks"), "{held:?}");
        scene.agent.ask_text(&["resume"])?;
        scene.agent.stop()
    }

    fn what_is_watched_is_shown_again_and_ends_with_its_reader() {
        let scene = Scene::new(1, &[])?;
        let (_vm, ip) = scene.living(1)?;
        for (what, wanted) in [("list", ip.to_string()), ("stats", "core.messages".to_owned())] {
            let mut watching = Command::new(binary()?)
                .args([what, "--watch", "1", "--control"])
                .arg(scene.agent.control())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            let out = BufReader::new(watching.stdout.take().context("no pipe")?);
            let shown = out.lines().map_while(Result::ok).filter(|line| line.contains(&wanted));
            ensure!(shown.take(3).count() == 3, "{what} was not shown again");
            // Nobody reads any more: the next time it is shown it ends, as after `| head`.
            let ended = watching.wait()?;
            ensure!(ended.success(), "{what}: {ended}");
        }
        scene.agent.stop()
    }
}
