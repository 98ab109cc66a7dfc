//! `cargo xtask mutants`: every small change of the core must fail some test.
use std::{
    fs,
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result};

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
    /// How many lives the simulation leads for each of them; 0 leaves it out, and builds faster
    #[arg(long, default_value_t = 1000)]
    lives: u32,
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
    if args.lives == 0 {
        fs::remove_dir_all(source.join("core/sim"))?;
        fs::write(source.join("core/sim.rs"), "")?;
    }

    let mut command = cargo();
    command.args(["mutants", "--no-shuffle", "--config"]);
    command.arg(root().join(CONFIG)).arg("--dir").arg(&package);
    command.arg("--output").arg(root().join("target/mutants"));
    command.args([
        "--jobs",
        &args.jobs.to_string(),
        "--minimum-test-timeout",
        if args.lives == 0 { "10" } else { "60" },
    ]);
    for file in &args.file {
        command.args(["--file", file]);
    }
    command.env("DHCP_RECLAIM_SIM_LIVES", args.lives.to_string());
    let signals = Signals::catch()?;
    match Guarded::spawn(command.stdin(Stdio::null()))?.wait(&signals, None)? {
        End::Exited(status) if status.success() => Ok(ExitCode::SUCCESS),
        // A test that does not end fails as well as one that says so.
        End::Exited(status) if status.code() == Some(TIMED_OUT) && listed("missed")?.is_empty() => {
            println!("none survived; of these a test ran out of its time ({OUT}/timeout.txt):");
            print!("{}", listed("timeout")?);
            Ok(ExitCode::SUCCESS)
        }
        other => {
            eprintln!(
                "error: not every mutant was caught ({OUT}/missed.txt): write a \
                 test that fails for it, or a reason into {CONFIG}"
            );
            Ok(other.code())
        }
    }
}

/// Mutants, one in a line.
fn listed(what: &str) -> Result<String> {
    let path = root().join(OUT).join(what).with_extension("txt");
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}
