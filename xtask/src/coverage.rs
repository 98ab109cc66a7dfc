//! `cargo xtask coverage`: which lines of the rooms that decide are run by fast tests.
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cargo::{cargo, root},
    pure::{self, Rooms},
    setup::{self, Scope},
};

/// Tests and what only they use; so is what begins in a file with [`TESTS`].
const NOT_COUNTED: [&str; 2] = ["core/sim/", "core/tests"];
const TESTS: &str = "#[cfg(test)]\nmod tests {\n";
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
    let report = dir.join("target/lcov.info");
    let mut command = cargo();
    command
        .args(["llvm-cov", "--lcov", "--output-path"])
        .arg(&report);
    command.args(which).current_dir(dir);
    for (variable, tool) in [("LLVM_COV", "llvm-cov"), ("LLVM_PROFDATA", "llvm-profdata")] {
        command.env(variable, Path::new(LLVM).join(tool));
    }
    let status = command.stdin(Stdio::null()).status();
    let status = status.context("cannot run cargo")?;
    ensure!(status.success(), "cargo llvm-cov failed ({status})");
    let report = fs::read_to_string(&report).with_context(|| report.display().to_string())?;
    files(&report, |file| {
        fs::read_to_string(file).with_context(|| file.to_owned())
    })
}

/// Reads lcov's tracefile (geninfo(1)): `SF:` and a path, then `DA:` and a line with its count.
fn files(report: &str, read: impl Fn(&str) -> Result<String>) -> Result<BTreeMap<String, Lines>> {
    let mut files = BTreeMap::<String, Lines>::new();
    let (mut file, mut tests) = (String::new(), usize::MAX);
    for word in report.lines() {
        if let Some(name) = word.strip_prefix("SF:") {
            name.clone_into(&mut file);
            let text = read(name)?;
            tests = text
                .find(TESTS)
                .map_or(usize::MAX, |at| text[..at].lines().count() + 1);
        } else if let Some(data) = word.strip_prefix("DA:") {
            let (line, count) = data.split_once(',').context("DA without a count")?;
            if line.parse::<usize>()? < tests {
                let lines = files.entry(file.clone()).or_default();
                lines.count += 1;
                lines.covered += u64::from(count != "0");
            }
        }
    }
    Ok(files)
}

fn show(name: &str, lines: Lines) {
    let share = lines.covered as f64 * 100.0 / lines.count.max(1) as f64;
    println!("{:>7}  {share:>6.2}%  {name}", lines.count);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_is_no_line_that_is_tested() {
        let text = format!("fn a() {{\n}}\nfn b() {{}}\n{TESTS}    fn c() {{}}\n}}\n");
        let report = "SF:a.rs\nDA:1,4\nDA:3,0\nDA:6,9\nDA:6,9\nend_of_record\n";
        let files = files(report, |_| Ok(text.clone())).unwrap();
        let Lines { count, covered } = files["a.rs"];
        assert_eq!((count, covered), (2, 1));
    }
}
