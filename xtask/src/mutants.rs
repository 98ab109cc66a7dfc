//! `cargo xtask mutants`: every small change of the core must fail some test.
use std::{
    fs,
    path::PathBuf,
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{
    cargo::{cargo, root},
    guard::{End, Guarded, Signals},
    pure::{self, Rooms},
    setup,
};

#[derive(clap::Args)]
pub struct Args {
    /// Only files of the core whose path matches, as in `gates.rs`; may be repeated
    #[arg(long, value_name = "GLOB")]
    file: Vec<String>,
    /// How many at once
    #[arg(long, default_value_t = 2)]
    jobs: u32,
}

/// cargo-mutants ends with it if for some mutant the tests did not end in their time.
const TIMED_OUT: i32 = 3;
const OUT: &str = "target/mutants/mutants.out";

/// Where reasons for mutants that may survive are.
const CONFIG: &str = ".cargo/mutants.toml";

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure_cargo_tool("cargo-mutants", "27.1.0")?;
    let package = root().join("target/mutants/package");
    let source = pure::package(&package, Rooms::Core)?;
    // It would be asked by nobody: its tests need an optimised build, which takes a minute for each mutant.
    fs::remove_dir_all(source.join("core/sim"))?;
    fs::write(source.join("core/sim.rs"), "")?;

    let mut command = cargo();
    command.args(["mutants", "--no-shuffle", "--config"]);
    command.arg(root().join(CONFIG)).arg("--dir").arg(&package);
    command.arg("--output").arg(root().join("target/mutants"));
    command.args([
        "--jobs",
        &args.jobs.to_string(),
        "--minimum-test-timeout",
        "10",
    ]);
    for file in &args.file {
        command.args(["--file", file]);
    }
    let signals = Signals::catch()?;
    match Guarded::spawn(command.stdin(Stdio::null()))?.wait(&signals, None)? {
        End::Exited(status) if status.success() => Ok(ExitCode::SUCCESS),
        // Some test had failed by then, or they only were too slow.
        End::Exited(status) if status.code() == Some(TIMED_OUT) && none_survived()? => {
            Ok(ExitCode::SUCCESS)
        }
        other => {
            eprintln!(
                "error: not every mutant was caught ({OUT}): write a test that fails for it, or a reason \
                 into {CONFIG}"
            );
            Ok(other.code())
        }
    }
}

/// Says which have, or may have.
fn none_survived() -> Result<bool> {
    let out = root().join(OUT);
    let outcomes = fs::read(out.join("outcomes.json")).context("what cargo-mutants found")?;
    let outcomes: Outcomes = serde_json::from_slice(&outcomes)?;
    let mut none = true;
    for outcome in outcomes.outcomes {
        let survived = match &*outcome.summary {
            "MissedMutant" => true,
            "Timeout" => {
                let log = fs::read(out.join(&outcome.log_path));
                let log = log.context("what a mutant's tests said")?;
                !has_failed_test(&String::from_utf8_lossy(&log))
            }
            _ => false,
        };
        if survived {
            eprintln!(
                "error: no test failed: {OUT}/{}",
                outcome.log_path.display()
            );
            none = false;
        }
    }
    Ok(none)
}

#[derive(Deserialize)]
struct Outcomes {
    outcomes: Vec<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    summary: String,
    /// Beside the outcomes.
    log_path: PathBuf,
}

fn has_failed_test(log: &str) -> bool {
    let mut lines = log.lines();
    lines.any(|line| line.starts_with("test ") && line.ends_with(" ... FAILED"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_failed_is_found() {
        assert!(has_failed_test(
            "running 2 tests\ntest a ... ok\ntest b::c ... FAILED\n"
        ));
        assert!(!has_failed_test("running 2 tests\ntest a ... ok\n"));
    }
}
