//! `cargo xtask bench`: what it costs and how fast it is, beside what people use today.
use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result};
use dhcp_reclaim_tests::{
    agent::BIN,
    clock::now,
    report::{Machine, Report, Row},
    sandbox::run,
};

use crate::{
    cargo::{self, root},
    guard::{End, Guarded, Signals, as_root},
    setup::{self, Scope},
};

mod render;

#[derive(clap::Args)]
pub struct Args {
    /// Fewer rounds and smaller crowds: below four minutes, and no more than a hint
    #[arg(long)]
    quick: bool,
    /// Where the figures go
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
    /// Only these sections: cost, throughput, reclaim, storm, steady, attach
    #[arg(long, value_name = "SECTION")]
    only: Vec<String>,
    /// Measure nothing: render docs/benchmarks.md from the figures of an earlier run
    #[arg(long, conflicts_with_all = ["quick", "only"])]
    render: bool,
}

const DOCS: &str = "docs/benchmarks.md";
const PACKAGES: [&str; 2] = ["dhcp-reclaim-agent", "dhcp-reclaim-bench"];

pub fn main(args: &Args) -> Result<ExitCode> {
    if args.render {
        let text = fs::read_to_string(&args.json)
            .with_context(|| format!("cannot read {}", args.json.display()))?;
        write_docs(&serde_json::from_str(&text)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    setup::ensure(Scope::Bench)?;
    let [agent, bench] = build()?;
    let mut command = vec![bench.into()];
    command.extend(args.quick.then(|| "--quick".into()));
    for section in &args.only {
        command.extend(["--only".into(), section.into()]);
    }
    let mut command = as_root(&command, &[(BIN, agent.into())])?;
    let (reader, writer) = std::io::pipe()?;
    command.stdout(writer);
    let machine = machine()?;
    let begin = now();
    let signals = Signals::catch()?;
    let child = Guarded::spawn(&mut command)?;
    // The pipe ends with the bench, not with us.
    command.stdout(Stdio::null());
    let rows = std::thread::spawn(move || -> Result<Vec<Row>> {
        let mut section = String::new();
        let mut rows = Vec::new();
        for line in BufReader::new(reader).lines() {
            let row: Row = serde_json::from_str(&line?)?;
            if row.section != section {
                section.clone_from(&row.section);
                println!("\n== {section}");
            }
            println!("{}", render::line(&row));
            rows.push(row);
        }
        Ok(rows)
    });
    let end = child.wait(&signals, None)?;
    let Ok(rows) = rows.join() else {
        anyhow::bail!("cannot read the rows");
    };
    let report = Report {
        machine,
        quick: args.quick,
        seconds: (now() - begin).as_secs(),
        rows: rows?,
    };
    let json = serde_json::to_string_pretty(&report)? + "\n";
    fs::write(&args.json, json).with_context(|| format!("cannot write {}", args.json.display()))?;
    println!("\n{}", render::summary(&report));
    println!("figures: {}", args.json.display());
    let whole = matches!(&end, End::Exited(status) if status.success());
    if whole && !args.quick && args.only.is_empty() {
        write_docs(&report)?;
    }
    Ok(end.code())
}

fn write_docs(report: &Report) -> Result<()> {
    let path = root().join(DOCS);
    fs::write(&path, render::docs(report)?).with_context(|| format!("cannot write {DOCS}"))?;
    println!("rendered: {DOCS}");
    Ok(())
}

/// Both as they are released: what a user runs is what is measured.
fn build() -> Result<[PathBuf; 2]> {
    let mut built = cargo::build(&[
        "build",
        "--release",
        "--bins",
        "-p",
        PACKAGES[0],
        "-p",
        PACKAGES[1],
    ])?;
    let mut take = |package: &str, name: &str| {
        let at = built
            .iter()
            .position(|built| built.kind == "bin" && built.name == name);
        at.map(|at| built.swap_remove(at).executable)
            .with_context(|| format!("cargo built no {name} of {package}"))
    };
    Ok([
        take(PACKAGES[0], "dhcp-reclaim")?,
        take(PACKAGES[1], "dhcp-reclaim-bench")?,
    ])
}

fn machine() -> Result<Machine> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
    let cpuinfo = read("/proc/cpuinfo")?;
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned());
    let load = read("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default().parse()?;
    let date = run(Command::new("date").args(["-u", "+%F"]))?;
    Ok(Machine {
        cpu,
        cpus: std::thread::available_parallelism()?.get(),
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        date: date.trim().to_owned(),
        load,
    })
}
