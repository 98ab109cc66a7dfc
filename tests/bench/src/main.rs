//! What `cargo xtask bench` runs as root: each section of the table in a sandbox of its own. Rows go
//! to standard output, a line each; what is going on goes to standard error.
use std::{
    env,
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use dhcp_reclaim_tests::{
    report::Row,
    sandbox::{self, MARK, Sandbox},
};

mod attach;
mod cost;
mod lab;
mod reclaim;
mod stats;
mod steady;
mod storm;
mod sys;
mod throughput;

#[derive(Parser)]
struct Args {
    /// Fewer rounds and smaller crowds
    #[arg(long)]
    quick: bool,
    /// Only these sections
    #[arg(long)]
    only: Vec<Section>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    Cost,
    Throughput,
    Reclaim,
    Storm,
    Steady,
    Attach,
}

/// What a row goes through on its way out of a sandbox, among whatever else is said there.
const ROW: &str = "ROW ";
/// A section that takes longer has got stuck.
const LIMIT: Duration = Duration::from_secs(900);

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if sandbox::inside() {
        sandbox::enter()?;
        let [section] = args.only[..] else {
            bail!("one section in a sandbox");
        };
        for row in section.rows(args.quick)? {
            println!("{ROW}{}", serde_json::to_string(&row)?);
        }
        return Ok(());
    }
    let mut failed = Vec::new();
    for section in Section::value_variants() {
        if !args.only.is_empty() && !args.only.contains(section) {
            continue;
        }
        // What the other sections say is worth having.
        if let Err(error) = outside(*section, args.quick) {
            eprintln!("{}: {error:#}", section.name());
            failed.push(section.name());
        }
    }
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

impl Section {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn rows(self, quick: bool) -> Result<Vec<Row>> {
        match self {
            Self::Cost => cost::rows(quick),
            Self::Throughput => throughput::rows(quick),
            Self::Reclaim => reclaim::rows(quick),
            Self::Storm => storm::rows(quick),
            Self::Steady => steady::rows(quick),
            Self::Attach => attach::rows(quick),
        }
    }
}

fn outside(section: Section, quick: bool) -> Result<()> {
    let (reader, writer) = std::io::pipe().context("pipe")?;
    let mut args = vec![
        "dhcp-reclaim-bench".to_owned(),
        "--only".to_owned(),
        section.name(),
    ];
    args.extend(quick.then(|| "--quick".to_owned()));
    let mark = format!("{}-bench-{}", std::process::id(), section.name());
    let mut sandbox = Sandbox::spawn(
        &env::current_exe()?,
        &args[1..],
        &[(MARK, OsStr::new(&mark))],
        Some(writer.into()),
    )?;
    for line in BufReader::new(reader).lines() {
        let line = line?;
        match line.strip_prefix(ROW) {
            Some(row) => println!("{row}"),
            None => eprintln!("{line}"),
        }
    }
    let Some(status) = sandbox.wait(LIMIT)? else {
        bail!("still running after {LIMIT:?}");
    };
    ensure!(status.success(), "{status}");
    Ok(())
}
