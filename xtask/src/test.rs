//! `cargo xtask test`: format, lints, every test and what `cargo xtask run` shows, with one line at the
//! end that counts them.
use std::{
    collections::BTreeSet,
    env,
    io::{BufReader, Read as _, Write},
    process::{Command, ExitCode, Stdio},
    thread::available_parallelism,
};

use anyhow::{Context as _, Result, bail};
use dhcp_reclaim_tests::{agent::BIN, guest};

use crate::{
    cargo::{self, Built, build_agent, cargo},
    guard::{End, Guarded, Signals, as_root},
    setup::{self, Scope},
    vm,
};

#[derive(clap::Args)]
pub struct Args {
    /// Only the tests whose names contain this, without format and lints
    filter: Option<String>,
}

/// The kernel half's binary links for BPF only; its library is what the host can test.
const HOST: &[&str] = &[
    "-p",
    "dhcp-reclaim-agent",
    "-p",
    "dhcp-reclaim-tests",
    "-p",
    "dhcp-reclaim-bench",
    "-p",
    "xtask",
];
const KERNEL_HALF: &[&str] = &["-p", "dhcp-reclaim-ebpf", "--lib"];
/// A workspace of its own, which nothing else builds; its lock file must be what it builds with.
const FUZZ_TARGETS: &[&str] = &[
    "--locked",
    "--manifest-path",
    "tests/fuzz/Cargo.toml",
    "--target-dir",
    "target",
];
const LAB_PACKAGE: &str = "tests";

/// `xtask run`, as its users call it: it fails if the lease store does not say what it shows.
const SHOWN: [(&str, &[&str]); 3] = [
    ("the main job", &[]),
    ("the main job, guests boot", &["--guest", "qemu"]),
    ("the main job, on another kernel", &["--in-vm", "5.10"]),
];

#[derive(Default)]
pub struct Summary {
    pub suites: Vec<(String, Count)>,
    pub interrupted: Option<i32>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub passed: u32,
    pub failed: u32,
    pub skipped: u32,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure(match args.filter {
        None => Scope::Vm,
        Some(_) => Scope::Lab,
    })?;
    let mut summary = Summary::default();
    if args.filter.is_none() {
        summary.check("format", cargo().args(["fmt", "--all", "--check"]))?;
        let clippy = |what: &[&str], targets: &[&str]| {
            let mut command = cargo();
            command.arg("clippy").args(what).args(targets);
            command.args(["--", "-D", "warnings"]);
            command
        };
        summary.check("clippy", &mut clippy(HOST, &["--all-targets"]))?;
        summary.check(
            "clippy, kernel half",
            &mut clippy(KERNEL_HALF, &["--tests"]),
        )?;
        summary.check("clippy, fuzz targets", &mut clippy(FUZZ_TARGETS, &[]))?;
    }

    // Everything is built before anything runs, and as the user.
    let agent = build_agent()?;
    let host = cargo::build(&[&["test", "--no-run"], HOST].concat())?;
    let kernel = cargo::build(&[&["test", "--no-run"], KERNEL_HALF].concat())?;
    let (mut unit, mut system): (Vec<_>, Vec<_>) = host
        .into_iter()
        .chain(kernel)
        // What makes the man pages is no test.
        .filter(|built| built.executable != agent && built.kind != "example")
        .partition(|built| built.kind != "test");
    unit.sort_by(|a, b| a.package.cmp(&b.package));
    // The lab tests itself before others rely on it.
    system.sort_by_key(|built| {
        (
            built.package != LAB_PACKAGE,
            built.name != "lab",
            built.name.clone(),
        )
    });

    let signals = Signals::catch()?;
    for built in &unit {
        let mut command = Command::new(&built.executable);
        command.stdin(Stdio::null());
        summary.run(built, args, command, &[], &signals)?;
    }
    if args.filter.as_ref().is_none_or(|filter| filter == "sim") {
        let simulation = [
            &["test", "--no-run", "--profile", "sim"][..],
            &["-p", "dhcp-reclaim-agent", "--lib"],
        ];
        for built in cargo::build(&simulation.concat())? {
            let mut command = Command::new(&built.executable);
            command.arg("core::sim").stdin(Stdio::null());
            // Nobody waits for CI, so there it is given its time.
            if env::var_os("CI").is_some() {
                command.env("DHCP_RECLAIM_SIM_LIVES", "1000000");
                command.env("DHCP_RECLAIM_SIM_SECONDS", "300");
            }
            summary.run(&built, args, command, &[], &signals)?;
        }
        let ran = |(_, count): &(String, Count)| count.passed + count.failed > 0;
        if summary.interrupted.is_none() && !summary.suites.last().is_some_and(ran) {
            bail!("no test has the name core::sim");
        }
    }
    // Guests for real boot a kernel, without which their tests skip; and so do machines.
    if args.filter.is_none() {
        let of_guests = [guest::KERNEL].into_iter();
        let of_guests = of_guests.filter(|version| !vm::SMALL.contains(version));
        for version in vm::SMALL.into_iter().chain(of_guests) {
            if let Err(error) = vm::fetch(version, false) {
                println!("FAILED: {error:#}");
                summary.one(&format!("the kernel {version}"), false);
            }
        }
    }
    for built in &system {
        // Each test owns its world and mostly waits; more than this would only stretch the waits.
        let threads = (1 + available_parallelism().map_or(1, usize::from)).min(8);
        let command = [built.executable.clone().into()];
        let command = as_root(&command, &[(BIN, agent.clone().into())])?;
        summary.run(
            built,
            args,
            command,
            &[format!("--test-threads={threads}")],
            &signals,
        )?;
    }
    if args.filter.is_none() {
        let lab: Vec<_> = system
            .into_iter()
            .filter(|built| built.package == LAB_PACKAGE)
            .collect();
        vm::small(&agent, &lab, &mut summary, &signals)?;
        for (name, args) in SHOWN {
            summary.shown(name, args, &signals)?;
        }
    }
    Ok(summary.end())
}

impl Summary {
    fn check(&mut self, name: &str, command: &mut Command) -> Result<()> {
        println!("== {name}");
        let status = command.status().context("cannot run cargo")?;
        self.one(name, status.success());
        Ok(())
    }

    /// A row for what is no suite.
    pub fn one(&mut self, name: &str, ok: bool) {
        let count = Count {
            passed: ok.into(),
            failed: (!ok).into(),
            skipped: 0,
        };
        self.suites.push((name.to_owned(), count));
    }

    fn run(
        &mut self,
        built: &Built,
        args: &Args,
        mut command: Command,
        more: &[String],
        signals: &Signals,
    ) -> Result<()> {
        if self.interrupted.is_some() {
            return Ok(());
        }
        let name = format!("{} {}", built.package, built.name);
        println!("== {name}");
        // Where cargo would run it: tests find their fixtures from there.
        command.current_dir(cargo::root().join(&built.package));
        command.args(&args.filter).args(more).arg("--show-output");
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        let child = Guarded::spawn(&mut command)?;
        command.stdout(Stdio::null()).stderr(Stdio::null());

        let output =
            std::thread::spawn(move || show(BufReader::new(reader), &mut std::io::stdout()));
        let end = child.wait(signals, None)?;
        let Ok(mut count) = output.join() else {
            bail!("cannot read the output of {name}");
        };
        match end {
            End::Exited(status) if status.success() => {}
            // A suite that dies says nothing of a failed test.
            End::Exited(_) => count.failed = count.failed.max(1),
            End::Interrupted(signal) => self.interrupted = Some(signal),
        }
        self.suites.push((name, count));
        Ok(())
    }

    fn shown(&mut self, name: &str, args: &[&str], signals: &Signals) -> Result<()> {
        if self.interrupted.is_some() {
            return Ok(());
        }
        println!("== {name}");
        let mut command = Command::new(env::current_exe()?);
        let (mut reader, writer) = std::io::pipe()?;
        command.arg("run").args(args).stdout(writer.try_clone()?);
        command.stderr(writer);
        let child = Guarded::spawn(&mut command)?;
        // It holds the pipe's other end too.
        drop(command);
        let output = std::thread::spawn(move || {
            let mut output = Vec::new();
            reader.read_to_end(&mut output).map(|_| output)
        });
        let end = child.wait(signals, None)?;
        let Ok(output) = output.join() else {
            bail!("cannot read the output of {name}");
        };
        let output = output.with_context(|| format!("the output of {name}"))?;
        let output = String::from_utf8_lossy(&output);
        match end {
            End::Exited(status) if status.success() => {
                println!("{}", output.lines().last().unwrap_or_default());
                self.one(name, true);
            }
            End::Exited(status) => {
                println!("{output}FAILED: {status}");
                self.one(name, false);
            }
            End::Interrupted(signal) => self.interrupted = Some(signal),
        }
        Ok(())
    }

    pub fn add(&mut self, other: Self) {
        self.suites.extend(other.suites);
        self.interrupted = self.interrupted.or(other.interrupted);
    }

    pub fn end(&self) -> ExitCode {
        println!("\n== summary");
        let mut all = Count::default();
        for (name, count) in &self.suites {
            let Count {
                passed,
                failed,
                skipped,
            } = count;
            if passed + failed + skipped > 0 {
                println!("{name:<48} {passed:>4} passed {failed:>3} failed {skipped:>3} skipped");
            }
            all.passed += passed;
            all.failed += failed;
            all.skipped += skipped;
        }
        if self.interrupted.is_some() {
            println!("interrupted; this is not the whole");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            all.passed, all.failed, all.skipped
        );
        if let Some(signal) = self.interrupted {
            return End::Interrupted(signal).code();
        }
        if all.passed + all.failed == 0 {
            eprintln!(
                "error: no test ran: {}",
                match all.skipped {
                    0 => "none has such a name",
                    _ => "all that have such a name were skipped",
                }
            );
            return ExitCode::FAILURE;
        }
        match all.failed {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }
}

/// Passes on what matters of a test binary's output, and counts.
fn show(reader: impl std::io::BufRead, out: &mut impl Write) -> Count {
    let mut output = Output::default();
    for line in reader.split(b'\n').map_while(Result::ok) {
        output.line(&String::from_utf8_lossy(&line), out);
    }
    output.count()
}

/// A test binary's output, read line by line.
///
/// The count is libtest's own last line: a test of the lab runs itself once more in a world of its
/// own, and so says its results twice. A test that cannot run here says `SKIP name: reason`, which
/// libtest counts as passed. One that has measured something says `NOTE ...`.
#[derive(Default)]
pub struct Output {
    count: Count,
    skips: BTreeSet<String>,
    /// libtest tells the output of those that passed first, then of those that failed.
    details: bool,
    failures: bool,
}

impl Output {
    pub fn line(&mut self, line: &str, out: &mut impl Write) {
        self.details |= line == "successes:" || line == "failures:";
        self.failures |= line == "failures:";
        if let Some(total) = line.strip_prefix("test result: ").and_then(total) {
            self.count = total;
        }
        let skip = line.starts_with("SKIP ") && self.skips.insert(line.to_owned());
        let result = !self.details && line.starts_with("test ") && line.contains(" ... ");
        if result || skip || line.starts_with("NOTE ") || self.failures {
            // Nobody may be left to read it; the count is what matters.
            let _ = writeln!(out, "{line}");
        }
    }

    /// Whole lines: `SKIP name: reason`.
    pub fn skips(&self) -> impl Iterator<Item = &str> {
        self.skips.iter().map(String::as_str)
    }

    pub fn count(&self) -> Count {
        let skipped = u32::try_from(self.skips.len()).unwrap_or(u32::MAX);
        Count {
            skipped,
            passed: self.count.passed.saturating_sub(skipped),
            failed: self.count.failed,
        }
    }
}

/// Reads `ok. 3 passed; 0 failed; ...`.
fn total(result: &str) -> Option<Count> {
    let (_, counts) = result.split_once(". ")?;
    let mut numbers = counts
        .split("; ")
        .map(|count| count.split(' ').next()?.parse().ok());
    let (passed, failed) = (numbers.next()??, numbers.next()??);
    Some(Count {
        passed,
        failed,
        skipped: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_not_passes() {
        let output = "running 3 tests\ntest a ... ok\ntest b ... ok\ntest c ... ok\n\n\
                      successes:\n\n---- b stdout ----\nSKIP b: no kernel\n\
                      test result: ok. 1 passed; 0 failed; 0 ignored\n\n\
                      test result: ok. 3 passed; 0 failed; 0 ignored\n";
        let count = show(output.as_bytes(), &mut Vec::new());
        assert_eq!((count.passed, count.failed, count.skipped), (2, 0, 1));
        let failed = show(
            "test result: FAILED. 2 passed; 1 failed; 0 ignored\n".as_bytes(),
            &mut Vec::new(),
        );
        assert_eq!((failed.passed, failed.failed, failed.skipped), (2, 1, 0));
    }

    #[test]
    fn only_tests_that_ran_and_passed_are_a_success() {
        let of = |counts: &[(u32, u32, u32)]| {
            let mut summary = Summary::default();
            for &(passed, failed, skipped) in counts {
                let mut one = Summary::default();
                let count = Count {
                    passed,
                    failed,
                    skipped,
                };
                one.suites.push(("suite".to_owned(), count));
                summary.add(one);
            }
            summary
        };
        assert_eq!(of(&[(0, 0, 0)]).end(), ExitCode::FAILURE);
        assert_eq!(of(&[(0, 0, 2)]).end(), ExitCode::FAILURE);
        assert_eq!(of(&[(0, 0, 2), (1, 0, 0)]).end(), ExitCode::SUCCESS);
        assert_eq!(of(&[(1, 0, 0), (1, 1, 0)]).end(), ExitCode::FAILURE);
        let mut interrupted = of(&[(1, 0, 0)]);
        for signal in [2, 15] {
            interrupted.add(Summary {
                interrupted: Some(signal),
                ..Summary::default()
            });
        }
        assert_eq!(interrupted.end(), ExitCode::from(130));
    }
}
