//! `dhcp-reclaim top` in a terminal: what is shown, what keys do, and what is left of it.
use std::{net::Ipv4Addr, process::Command, time::Duration};

use anyhow::{Result, bail, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, binary},
    lab_test,
    scene::Scene,
    tmux::Terminal,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn start(terminal: &Terminal, agent: &Agent) -> Result<()> {
    let control = agent.control().display();
    terminal.line(&format!(
        "clear; {} top --control {control}",
        binary()?.display()
    ))
}

/// As it was, and usable.
fn restored(terminal: &Terminal, before: &str) -> Result<()> {
    let after = terminal.settings()?;
    ensure!(after == before, "stty before:\n{before}\nafter:\n{after}");
    terminal.line("echo $((40 + 2)) is typed")?;
    terminal.wait_text(&["42 is typed"]).map(drop)
}

/// The row of an address.
fn row(screen: &str, ip: Ipv4Addr) -> Option<&str> {
    let start = format!(" {ip} ");
    screen.lines().find(|line| line.starts_with(&start))
}

/// The sandbox's own process that was started as `dhcp-reclaim top`.
fn running_top() -> Result<Pid> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        // Processes come and go meanwhile.
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.split(|byte| *byte == 0).nth(1) == Some(b"top")
            && let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
        {
            return Ok(Pid::from_raw(pid));
        }
    }
    bail!("top does not run")
}

lab_test! {
    within Duration::from_secs(240);

    fn a_death_is_seen_at_80x24_and_the_keys_work() {
        let scene = Scene::new(3, &["--hold-down-uplink", "3s"])?;
        let (mut dead, dead_ip) = scene.living(1)?;
        let (_alive, alive_ip) = scene.living(2)?;
        let terminal = Terminal::open("terminal", 80, 24)?;
        let before = terminal.settings()?;
        start(&terminal, &scene.agent)?;
        let (dead_text, alive_text) = (dead_ip.to_string(), alive_ip.to_string());
        let screen = terminal.wait_text(&["br0", "bound 2", &dead_text, &alive_text, "q quit", "held by gate"])?;
        ensure!(screen.lines().all(|line| line.chars().count() <= 80), "{screen}");
        println!("{screen}");

        scene.dies(&mut dead, dead_ip)?;
        let screen = terminal.wait("the released row", Duration::from_secs(20), |screen| {
            row(screen, dead_ip).is_some_and(|row| row.contains("released"))
                && screen.contains(" 1 now") && screen.contains("sent 1")
        })?;
        ensure!(screen.contains("RELEASE sent to"), "{screen}");
        println!("{screen}");

        terminal.text("/vm2")?;
        terminal.wait("the filter", Duration::from_secs(20), |screen| {
            screen.contains("filter: vm2_") && row(screen, dead_ip).is_none() && row(screen, alive_ip).is_some()
        })?;
        terminal.keys(&["Enter", "Enter"])?;
        let screen = terminal.wait_text(&[&format!("explain {alive_ip}"), "GATE", "hold-down", "breaker"])?;
        println!("{screen}");
        terminal.keys(&["q", "Escape"])?;
        terminal.wait("the whole table", Duration::from_secs(20), |screen| {
            row(screen, dead_ip).is_some() && row(screen, alive_ip).is_some()
        })?;
        terminal.text("?")?;
        terminal.wait_text(&["turn the order round"])?;
        terminal.text("xss")?;
        terminal.wait_text(&["by port"])?;
        // A smaller window, as a person makes it, and back.
        terminal.resize(66, 12)?;
        terminal.wait("the small view", Duration::from_secs(20), |screen| {
            !screen.contains("held by gate") && row(screen, alive_ip).is_some() && screen.lines().count() <= 12
        })?;
        terminal.resize(80, 24)?;
        terminal.wait_text(&["held by gate", "Enter why"])?;
        terminal.text("p")?;
        terminal.wait_text(&["Hold all releases"])?;
        terminal.text("y")?;
        terminal.wait_text(&[" PAUSED ", "paused since", "from `dhcp-reclaim top`"])?;
        ensure!(scene.agent.gate(alive_ip, "paused")?.0 == "hold", "{}", scene.agent.explain(alive_ip)?);
        terminal.text("p")?;
        terminal.wait_text(&["Let releases go on?"])?;
        terminal.text("y")?;
        terminal.wait("the end of the pause", Duration::from_secs(20), |screen| {
            screen.contains("releases go on (it was") && !screen.contains(" PAUSED ")
        })?;
        ensure!(scene.agent.gate(alive_ip, "paused")?.0 == "pass", "{}", scene.agent.explain(alive_ip)?);
        terminal.text("q")?;
        terminal.wait_end(0)?;
        restored(&terminal, &before)
    }

    fn an_agents_restart_is_told_and_survived() {
        let scene = Scene::new(3, &[])?;
        let (_vm, ip) = scene.living(1)?;
        let terminal = Terminal::open("terminal", 80, 24)?;
        start(&terminal, &scene.agent)?;
        terminal.wait("the lease", Duration::from_secs(20), |screen| row(screen, ip).is_some())?;
        scene.agent.kill();
        let screen = terminal.wait_text(&["no answer for", "no agent is running here"])?;
        ensure!(row(&screen, ip).is_some(), "what was known is gone:\n{screen}");
        let agent = scene.world.agent(Hook::Tc).quick().start()?;
        terminal.wait_text(&["the agent was started again"])?;
        terminal.keys(&["Up"])?;
        terminal.wait("the lease, again", Duration::from_secs(20), |screen| {
            row(screen, ip).is_some() && screen.contains("bound 1") && screen.contains("q quit")
        })?;
        agent.stop()
    }

    fn signals_give_the_terminal_back() {
        let scene = Scene::new(3, &[])?;
        let terminal = Terminal::open("terminal", 80, 24)?;
        let before = terminal.settings()?;
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            start(&terminal, &scene.agent)?;
            terminal.wait_text(&["q quit"])?;
            kill(running_top()?, signal)?;
            terminal.wait_end(128 + signal as i32)?;
            restored(&terminal, &before)?;
        }
        Ok(())
    }

    fn without_an_agent_or_a_terminal_it_says_so_in_one_line() {
        let terminal = Terminal::open("terminal", 80, 24)?;
        terminal.line(&format!("clear; {} top --control /run/none", binary()?.display()))?;
        let screen = terminal.wait_end(3)?;
        ensure!(screen.starts_with("dhcp-reclaim: no agent is running here"), "{screen}");

        let scene = Scene::new(1, &[])?;
        let mut command = Command::new(binary()?);
        let output = command.arg("top").arg("--control").arg(scene.agent.control()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
        ensure!(said.starts_with("dhcp-reclaim: top needs a terminal") && said.lines().count() == 1, "{said}");
        Ok(())
    }
}
