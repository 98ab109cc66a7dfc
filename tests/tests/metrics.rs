//! Metrics, read by a real Prometheus: what is served, what the rules and the dashboard name, and an
//! alert that fires. Audited in `observe.rs`.
use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dhcp_reclaim_tests::{
    agent::STATE,
    lab_test,
    process::Process,
    sandbox::{DIR, find, run, skip},
    scene::Scene,
    watch::until,
    world::PATIENCE,
};
use serde_json::Value;

const AGENT: &str = "127.0.0.1:9798";
const PROMETHEUS: &str = "127.0.0.1:9090";

fn packaging(file: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging")
        .join(file);
    path.canonicalize()
        .with_context(|| path.display().to_string())
}

fn prometheus_or_skip(program: &str) -> Result<PathBuf> {
    match find(program) {
        Some(path) => Ok(path),
        None => skip(format!("{program} is not installed")),
    }
}

fn get(address: &str, target: &str) -> Result<String> {
    let address: SocketAddr = address.parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {target} HTTP/1.0\r\nHost: lab\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no headers")?;
    ensure!(head.contains(" 200 "), "{head}");
    Ok(body.to_owned())
}

/// `name{labels}` and the value of each sample.
fn samples(page: &str) -> Vec<(&str, f64)> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let sample = |line| {
        let (name, value) = str::rsplit_once(line, ' ')?;
        Some((name, value.parse().ok()?))
    };
    lines.filter_map(sample).collect()
}

fn value(page: &str, sample: &str) -> Result<f64> {
    let found = samples(page).into_iter().find(|(name, _)| *name == sample);
    Ok(found.with_context(|| format!("no {sample} in\n{page}"))?.1)
}

/// A label and the values of it that are asked for.
type Asked = (String, Vec<String>);

/// Metrics that a file names, each with those of its labels that are asked for by value.
fn named(text: &str) -> BTreeSet<(String, Vec<Asked>)> {
    let text = text.replace("\\\"", "\"");
    let mut found = BTreeSet::new();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (at, _) in text.match_indices("dhcp_reclaim_") {
        let rest = &text[at..];
        let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let inner = after
            .strip_prefix('{')
            .and_then(|rest| rest.split('}').next());
        let labels = inner.unwrap_or_default().split(',').filter_map(|part| {
            let (label, value) = part.split_once('=')?;
            let values = value.trim_matches(['~', '"']).split('|').map(str::to_owned);
            (label != "instance").then(|| (label.to_owned(), values.collect()))
        });
        found.insert((name.to_owned(), labels.collect()));
    }
    found
}

/// Everything that a file asks Prometheus for is served.
fn ensure_served(file: &str, page: &str) -> Result<usize> {
    let path = packaging(file)?;
    let text = fs::read_to_string(&path)?;
    let named = named(&text);
    for (name, labels) in &named {
        let of_name = |sample: &&str| sample.split('{').next() == Some(name.as_str());
        let all = samples(page).into_iter().map(|(name, _)| name);
        let all: Vec<&str> = all.filter(of_name).collect();
        ensure!(!all.is_empty(), "{file} names {name}, which is not served");
        for (label, values) in labels {
            for value in values {
                let pair = format!("{label}=\"{value}\"");
                let there = all.iter().any(|sample| sample.contains(&pair));
                ensure!(there, "{file} asks for {name}{{{pair}}}: {all:?}");
            }
        }
    }
    Ok(named.len())
}

fn start_prometheus() -> Result<Process> {
    let program = prometheus_or_skip("prometheus")?;
    let dir = Path::new(DIR).join("prometheus");
    fs::create_dir_all(&dir)?;
    let config = dir.join("prometheus.yml");
    fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: [{}]\n\
             scrape_configs: [{{job_name: dhcp-reclaim, static_configs: [{{targets: ['{AGENT}']}}]}}]\n",
            packaging("prometheus/dhcp-reclaim.rules.yml")?.display()
        ),
    )?;
    let mut command = Command::new(program);
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            dir.join("data").display()
        ))
        .arg(format!("--web.listen-address={PROMETHEUS}"));
    let mut process = Process::spawn(&dir, "prometheus", &mut command)?;
    process.wait_log(&["Server is ready to receive web requests."], PATIENCE)?;
    Ok(process)
}

fn ask(target: &str) -> Result<Value> {
    let text = get(PROMETHEUS, target)?;
    let answer: Value = serde_json::from_str(&text).with_context(|| text)?;
    ensure!(answer["status"] == "success", "{answer}");
    Ok(answer["data"].clone())
}

/// The value of the only series that a query finds, if it finds one.
fn query(text: &str) -> Result<Option<f64>> {
    let encoded: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let data = ask(&format!("/api/v1/query?query={encoded}"))?;
    let series = data["result"].as_array().context("no result")?;
    let [only] = series.as_slice() else {
        return Ok(None);
    };
    Ok(only["value"][1]
        .as_str()
        .and_then(|value| value.parse().ok()))
}

fn wait<T>(what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until(&Path::new(DIR).join("prometheus"), PATIENCE * 2, what, look)
}

/// Alerts that fire, by name.
fn firing() -> Result<Vec<String>> {
    let data = ask("/api/v1/alerts")?;
    let alerts = data["alerts"].as_array().context("no alerts")?;
    let fires = alerts.iter().filter(|alert| alert["state"] == "firing");
    let name = |alert: &Value| alert["labels"]["alertname"].as_str().map(str::to_owned);
    Ok(fires.filter_map(name).collect())
}

lab_test! {
    fn what_is_served_is_sound_and_is_all_that_rules_and_dashboard_name() {
        let scene = Scene::new(2, &["--metrics", AGENT])?;
        let before = get(AGENT, "/metrics")?;
        let (mut vm, ip) = scene.living(1)?;
        scene.dies(&mut vm, ip)?;
        scene.agent.wait_event("released", ip, PATIENCE)?;
        let page = until(Path::new(DIR), PATIENCE, "a page that counts it", || {
            let page = get(AGENT, "/metrics")?;
            let sent = value(&page, "dhcp_reclaim_releases_total{outcome=\"sent\"}")?;
            Ok((sent >= 1.0).then_some(page))
        })?;
        // The figures are those of what happened.
        for (sample, least) in [
            ("dhcp_reclaim_bindings{state=\"released\"}", 1.0),
            ("dhcp_reclaim_reclaim_seconds_count", 1.0),
            ("dhcp_reclaim_reclaim_seconds_sum", 1.0),
            ("dhcp_reclaim_records_total", 2.0),
            ("dhcp_reclaim_probes_total{result=\"sent\"}", 3.0),
            ("dhcp_reclaim_ports{role=\"uplink\"}", 1.0),
        ] {
            let found = value(&page, sample)?;
            ensure!(found >= least, "{sample} is {found}");
        }
        ensure!(value(&before, "dhcp_reclaim_releases_total{outcome=\"sent\"}")? == 0.0);
        // Nothing of a guest's is in it.
        for guests in [ip.to_string(), vm.mac.to_string()] {
            ensure!(!page.contains(&guests), "{guests} in\n{page}");
        }
        ensure!(ensure_served("prometheus/dhcp-reclaim.rules.yml", &page)? >= 10);
        ensure!(ensure_served("grafana/dhcp-reclaim.json", &page)? >= 15);
        // What is served is explained.
        let reference = packaging("../docs/observation.md")?;
        let reference = fs::read_to_string(reference)?;
        for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = line.split(' ').next().context("no name")?;
            ensure!(reference.contains(&format!("`{name}`")), "{name} is not in docs/observation.md");
        }
        let dashboard: Value = serde_json::from_slice(&fs::read(packaging("grafana/dhcp-reclaim.json")?)?)?;
        ensure!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 10));

        let promtool = prometheus_or_skip("promtool")?;
        let mut lint = Command::new(&promtool)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        lint.stdin.take().context("no pipe")?.write_all(page.as_bytes())?;
        let linted = lint.wait_with_output()?;
        let said = String::from_utf8_lossy(&linted.stderr).into_owned();
        ensure!(linted.status.success() && said.is_empty(), "{said}\n{page}");
        let rules = packaging("prometheus/dhcp-reclaim.rules.yml")?;
        run(Command::new(&promtool).args(["check", "rules"]).arg(&rules))?;
        let tests = packaging("prometheus/dhcp-reclaim.rules.test.yml")?;
        run(Command::new(&promtool).args(["test", "rules"]).arg(&tests))?;
        scene.agent.stop()
    }

    fn a_prometheus_scrapes_the_agent_and_an_alert_fires() {
        // Lines of the audit are lost: a condition that can be made.
        fs::create_dir_all(STATE)?;
        symlink("/dev/full", Path::new(STATE).join("audit.jsonl"))?;
        let scene = Scene::new(2, &["--metrics", AGENT])?;
        let _prometheus = start_prometheus()?;
        wait("a scrape", || Ok(query("up{job=\"dhcp-reclaim\"}")?.filter(|up| *up == 1.0)))?;
        wait("a figure from before", || query("dhcp_reclaim_audit_lost_total"))?;
        ensure!(firing()?.is_empty(), "{:?}", firing()?);
        let (mut vm, ip) = scene.living(1)?;
        wait("the lease", || {
            Ok(query("dhcp_reclaim_bindings{state=\"bound\"}")?.filter(|count| *count == 1.0))
        })?;
        scene.dies(&mut vm, ip)?;
        let fired = wait("the alert", || {
            let alerts = firing()?;
            Ok(alerts.contains(&"DhcpReclaimAuditLost".to_owned()).then_some(alerts))
        })?;
        ensure!(fired == ["DhcpReclaimAuditLost"], "{fired:?}");
        let sent = "dhcp_reclaim_releases_total{outcome=\"sent\"}";
        wait("the release", || Ok(query(sent)?.filter(|count| *count == 1.0)))?;
        scene.agent.stop()
    }

    fn nobody_holds_the_agent_up_by_its_metrics() {
        let scene = Scene::new(2, &["--metrics", AGENT])?;
        // Some say nothing, some never end, some ask and do not read.
        let mut crowd = Vec::new();
        for number in 0..40 {
            let Ok(mut stream) = TcpStream::connect(AGENT) else {
                bail!("client {number} cannot connect");
            };
            let _refused = match number % 3 {
                0 => Ok(()),
                1 => stream.write_all(&[b'a'; 4000]),
                _ => stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n"),
            };
            crowd.push(stream);
        }
        // Meanwhile it does its work.
        scene.meanwhile(1)?;
        scene.healthy()?;
        drop(crowd);
        let page = until(Path::new(DIR), PATIENCE, "a place among the clients", || {
            Ok(get(AGENT, "/metrics").ok())
        })?;
        ensure!(value(&page, "dhcp_reclaim_metrics_clients_refused_total")? >= 1.0, "{page}");
        // Without the setting there is nothing to connect to.
        scene.agent.stop()?;
        let agent = scene.world.agent(dhcp_reclaim_tests::agent::Hook::Tc).quick().start()?;
        ensure!(TcpStream::connect(AGENT).is_err());
        agent.stop()
    }
}
