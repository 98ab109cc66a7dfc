//! `cargo xtask fuzz`: hostile bytes, by a fuzzer that learns, or by the million.
use std::{
    fs,
    path::Path,
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cargo::{self, cargo, root},
    guard::{End, Guarded, Signals, as_root},
    setup::{self, Scope},
};

#[derive(clap::Args)]
pub struct Args {
    /// One of them only: classifier, record, leasequery, control, config, leasefile, row or store
    target: Option<String>,
    /// How long, all targets together
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Add what a fuzzer found new to the corpus in the repository
    #[arg(long)]
    keep: bool,
    /// Instead: so many mutants through the classifier, on the host and in the kernel, as in 1e8
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["target", "minutes", "keep"])]
    inputs: Option<f64>,
}

/// Where fuzz targets and their corpora are.
const DIR: &str = "tests/fuzz";
/// The lab's tests that go by the count of [`Args::inputs`].
const BY_COUNT: [&str; 2] = ["hostile", "agreement"];

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure(Scope::Build)?;
    if let Some(count) = args.inputs {
        ensure!(
            (1.0..=1e12).contains(&count),
            "--inputs {count}: give 1 to 1e12"
        );
        return by_count(count as u64);
    }
    setup::ensure_cargo_tool("cargo-fuzz", "0.13.2")?;
    let all = targets()?;
    let chosen: Vec<_> = match &args.target {
        None => all,
        Some(name) => {
            let known = all.join(", ");
            ensure!(
                all.contains(name),
                "no fuzz target `{name}`: there are {known}"
            );
            vec![name.clone()]
        }
    };
    let seconds = (args.minutes * 60 / chosen.len() as u64).max(1);
    let signals = Signals::catch()?;
    for target in &chosen {
        println!("== {target}, for {seconds} s");
        let grown = root().join("target/fuzz-found/corpus").join(target);
        let kept = root().join(DIR).join("corpus").join(target);
        fs::create_dir_all(&grown)?;
        fs::create_dir_all(&kept)?;
        let dirs = [grown.as_path(), kept.as_path()];
        let time = format!("-max_total_time={seconds}");
        if let Some(code) = run(target, &dirs, &[&time, "-print_final_stats=1"], &signals)? {
            eprintln!(
                "error: {target} did not end well. An input that is to blame is in \
                 target/fuzz-found/artifacts/{target}: put it into {DIR}/corpus/{target} under a name \
                 that says what it is"
            );
            return Ok(code);
        }
        if args.keep {
            let dirs = [kept.as_path(), grown.as_path()];
            if let Some(code) = run(target, &dirs, &["-merge=1"], &signals)? {
                return Ok(code);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One of libFuzzer's runs; how it ended, if not well.
fn run(
    target: &str,
    corpora: &[&Path],
    options: &[&str],
    signals: &Signals,
) -> Result<Option<ExitCode>> {
    let artifacts = root().join("target/fuzz-found/artifacts").join(target);
    fs::create_dir_all(&artifacts)?;
    let mut command = cargo();
    // Rust has no need of a sanitizer here, and those need a nightly compiler.
    command.args([
        "fuzz",
        "run",
        "--fuzz-dir",
        DIR,
        "--sanitizer",
        "none",
        "--target-dir",
    ]);
    command.arg(root().join("target/fuzz-build")).arg(target);
    command.args(corpora).arg("--").args(options);
    command.args(["-rss_limit_mb=2048", "-timeout=10", "-verbosity=0"]);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    let end = Guarded::spawn(command.stdin(Stdio::null()))?.wait(signals, None)?;
    Ok(match end {
        End::Exited(status) if status.success() => None,
        other => Some(other.code()),
    })
}

/// Those that have a file.
fn targets() -> Result<Vec<String>> {
    let dir = root().join(DIR).join("fuzz_targets");
    let mut names = Vec::new();
    for file in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = file?.path();
        names.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}

fn by_count(count: u64) -> Result<ExitCode> {
    let mut args = vec![
        "test",
        "--no-run",
        "--profile",
        "fuzz",
        "--package",
        "dhcp-reclaim-tests",
    ];
    args.extend(BY_COUNT.iter().flat_map(|name| ["--test", *name]));
    let built = cargo::build(&args)?;
    let signals = Signals::catch()?;
    for test in built.into_iter().filter(|built| built.kind == "test") {
        println!("== {}", test.name);
        let command = [test.executable.into()];
        let mut command = as_root(
            &command,
            &[("DHCP_RECLAIM_INPUTS", count.to_string().into())],
        )?;
        command.args(["--nocapture", "--test-threads=1"]);
        command.current_dir(root().join("tests"));
        match Guarded::spawn(&mut command)?.wait(&signals, None)? {
            End::Exited(status) if status.success() => {}
            other => return Ok(other.code()),
        }
    }
    Ok(ExitCode::SUCCESS)
}
