//! `cargo xtask coverage`: which lines of the rooms that decide are run by fast tests.
use std::{
    collections::BTreeMap,
    path::Path,
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    cargo::{cargo, root},
    pure::{self, Rooms},
    setup::{self, Scope},
};

/// Tests and what only they use.
const NOT_COUNTED: [&str; 2] = ["core/sim/", "core/tests"];
/// Of an LLVM at least as new as rustc's.
const LLVM: &str = "/usr/lib/llvm-22/bin";

#[derive(Clone, Copy, Default)]
struct Lines {
    count: u64,
    covered: u64,
}

pub fn main() -> Result<ExitCode> {
    setup::ensure(Scope::Build)?;
    setup::ensure_cargo_tool("cargo-llvm-cov", "0.9.1")?;
    let package = root().join("target/coverage");
    let source = pure::package(&package, Rooms::CoreAndPacket)?;
    let mut files = lines(&package, &[])?;
    let wire = root().join("dhcp-reclaim-ebpf/src/wire.rs");
    files.extend(lines(root(), &["-p", "dhcp-reclaim-ebpf", "--lib"])?);

    println!("  lines  covered");
    for (room, place) in [
        ("core", source.join("core")),
        ("packet", source.join("packet")),
        ("wire", wire),
    ] {
        let of_room: BTreeMap<_, _> = files
            .iter()
            .filter(|(file, _)| Path::new(file).starts_with(&place))
            .filter(|(file, _)| !NOT_COUNTED.iter().any(|tests| file.contains(tests)))
            .collect();
        ensure!(!of_room.is_empty(), "nothing of {room} in the report");
        let sum = of_room.values().fold(Lines::default(), |sum, lines| Lines {
            count: sum.count + lines.count,
            covered: sum.covered + lines.covered,
        });
        show(room, sum);
        for (file, lines) in of_room {
            let file = Path::new(file);
            let name = file.file_name().unwrap_or(file.as_os_str());
            show(&format!("  {}", name.display()), *lines);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a package's tests, and counts lines by file.
fn lines(dir: &Path, which: &[&str]) -> Result<BTreeMap<String, Lines>> {
    let mut command = cargo();
    command.args(["llvm-cov", "--json", "--summary-only"]);
    command.args(which).current_dir(dir);
    for (variable, tool) in [("LLVM_COV", "llvm-cov"), ("LLVM_PROFDATA", "llvm-profdata")] {
        command.env(variable, Path::new(LLVM).join(tool));
    }
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "cargo llvm-cov failed ({})",
        output.status
    );
    // The tests themselves write before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.lines().rfind(|line| line.starts_with('{'));
    let report: Value = serde_json::from_str(json.context("no report")?)?;
    files(&report).context("the report has another form")
}

fn files(report: &Value) -> Option<BTreeMap<String, Lines>> {
    let files = report["data"][0]["files"].as_array()?;
    let lines = |file: &Value| {
        let lines = &file["summary"]["lines"];
        let name = file["filename"].as_str()?.to_owned();
        let (count, covered) = (lines["count"].as_u64()?, lines["covered"].as_u64()?);
        Some((name, Lines { count, covered }))
    };
    files.iter().map(lines).collect()
}

fn show(name: &str, lines: Lines) {
    let share = lines.covered as f64 * 100.0 / lines.count.max(1) as f64;
    println!("{:>7}  {share:>6.2}%  {name}", lines.count);
}
