//! `cargo xtask vm`: the system tests inside of machines that boot other kernels than this host's.
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write, stdout},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dhcp_reclaim_tests::{
    agent::BIN,
    boot::{Accel, Kernel, KernelVersion, Machine, kernel::version, last_words},
    clock::{Deadline, SLOW},
    sandbox::run,
};

use crate::{
    cargo::{self, Built, build_agent},
    guard::{End, Guarded, Signals},
    setup::{self, Scope},
    test::{Output, Summary},
};
use guest::{Plan, Program};
use image::Userland;
use report::Word;

pub mod guest;
mod image;
mod report;

#[derive(clap::Args)]
pub struct Args {
    /// Which kernels: 5.10, 6.1, 6.12, newest; all of them if none is named
    #[arg(long, value_delimiter = ',')]
    kernel: Vec<KernelVersion>,
    /// With the processor's own virtualisation, if it works here: faster
    #[arg(long)]
    kvm: bool,
    /// Only fetch the kernels, and newer ones where there are
    #[arg(long)]
    fetch: bool,
    /// How many machines at once: with two, a suite's output comes when it has ended
    #[arg(long, default_value_t = 1, value_name = "N")]
    jobs: usize,
    /// Only what `cargo xtask test` runs of all this: two kernels, a few tests
    #[arg(long, conflicts_with_all = ["kernel", "filter", "fetch", "kvm", "jobs"])]
    small: bool,
    /// Only the tests whose names contain one of these
    filter: Vec<String>,
}

/// What a machine gets. The archive is in its memory twice while it boots.
const MEMORY_MIB: u32 = 2048;
const CPUS: u8 = 2;
/// A test mostly waits, but starting an agent is work, and more so for an emulated verifier.
const THREADS: u8 = 2;
/// What an emulated processor needs more of a wait's limit.
const EMULATION_FACTOR: u32 = 3;

/// What an emulated processor does less of: how often an agent is killed in each world of the suite
/// `crash`, where each start is a verifier's work, and how many VMs die at once in the suite `mass`.
const FEWER: [(&str, &str); 2] = [
    ("DHCP_RECLAIM_CRASHES", "15"),
    ("DHCP_RECLAIM_CROWD", "200"),
];

/// From qemu's start to the first word.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// More than any one test may take, emulated.
const SILENCE_LIMIT: Duration = Duration::from_secs(900);
/// How often signals and limits are looked at while nothing is said.
const TICK: Duration = Duration::from_millis(200);

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure(Scope::Vm)?;
    let versions = match &args.kernel[..] {
        _ if args.small => SMALL.to_vec(),
        [] => KernelVersion::ALL.to_vec(),
        named => named.to_vec(),
    };
    let mut kernels = Vec::new();
    for version in versions {
        let kernel = fetch(version, args.fetch)?;
        println!("  kernel {version:<8} {}", kernel.release);
        kernels.push(kernel);
    }
    if args.fetch {
        return Ok(ExitCode::SUCCESS);
    }
    // Two may be one release, which has one folder.
    let mut releases = BTreeSet::new();
    kernels.retain(|kernel| releases.insert(kernel.release.clone()));
    let signals = Signals::catch()?;
    let accel = accel(args.kvm, kernels.first().context("no kernel")?)?;
    let agent = build_agent()?;
    let mut suites = cargo::build(&["test", "--no-run", "-p", "dhcp-reclaim-tests", "--tests"])?;
    suites.retain(|built| built.kind == "test" && !SAME_EVERYWHERE.contains(&built.name.as_str()));
    suites.sort_by_key(|built| (built.name != "lab", built.name.clone()));

    let mut summary = Summary::default();
    if args.small {
        small(&agent, &suites, &mut summary, &signals)?;
        return Ok(summary.end());
    }
    let matrix = Matrix::new(&agent, &suites, accel)?;
    matrix.run_all(&kernels, args, &mut summary, &signals);
    Ok(summary.end())
}

fn accel(kvm: bool, kernel: &Kernel) -> Result<Accel> {
    let dir = cargo::root().join("target/vm");
    fs::create_dir_all(&dir)?;
    Ok(Accel::wanted(kvm, kernel, &dir))
}

/// Suites that no kernel changes: what documents say, and what a terminal shows.
const SAME_EVERYWHERE: [&str; 3] = ["documents", "reference", "top"];

/// What a machine lacks that a test may want, as the test says it; and the first kernel that has it.
const SKIPS: [(&str, Option<(u32, u32)>); 9] = [
    // Real guests would be emulated by what is emulated, and take minutes to boot.
    ("there is no qemu-system-x86_64 here", None),
    // Read what the agent says, whatever kernel is below: this host's suites ask them.
    ("prometheus is not installed", None),
    ("promtool is not installed", None),
    ("there is no systemd-analyze", None),
    // A machine has it if this host has.
    ("systemd-networkd is not installed", None),
    // Only that command builds one.
    ("`cargo xtask dist --test` builds the older version", None),
    ("Linux tells what it verified from 5.16 on", Some((5, 16))),
    ("Linux renames a link that is up from 6.2 on", Some((6, 2))),
    ("tcx comes with Linux 6.6", Some((6, 6))),
];

/// A test that skips has shown nothing: only what is expected to is no failure.
fn may_skip(release: &str, skip: &str) -> bool {
    let running = version(release);
    SKIPS.iter().any(|(reason, since)| {
        skip.contains(reason) && since.is_none_or(|since| running.is_some_and(|it| it < since))
    })
}

/// The oldest, by clsact, and one with tcx.
pub const SMALL: [KernelVersion; 2] = [KernelVersion::V5_10, KernelVersion::V6_12];

/// The programs themselves, a life with each server, and all that the kernel of a small host does not
/// have (VLANs of a bridge, 802.1Q, netem): of each suite all tests, or those that are named.
const SMALL_TESTS: [(&str, &[&str]); 7] = [
    ("agreement", &[]),
    ("captures", &[]),
    ("kernel", &[]),
    (
        "main_road",
        &[
            "dnsmasq_remote_tc::dies_with_its_port",
            "kea_local_tc::dies_with_its_port",
            "isc_remote_xdp::dies_behind_its_port",
        ],
    ),
    ("verifier", &[]),
    ("vlan", &[]),
    ("wires", &[]),
];

/// What `xtask test` runs of all this.
pub fn small(
    agent: &Path,
    suites: &[Built],
    summary: &mut Summary,
    signals: &Signals,
) -> Result<()> {
    let tests = |suite: &str| {
        let found = SMALL_TESTS.iter().find(|(name, _)| *name == suite);
        found.map(|(_, tests)| *tests)
    };
    for (suite, names) in SMALL_TESTS {
        let built = suites.iter().find(|built| built.name == suite);
        let built = built.with_context(|| format!("there is no suite {suite}"))?;
        let list = run(Command::new(&built.executable).arg("--list"))?;
        for name in names {
            ensure!(list.contains(name), "{suite} has no test {name}");
        }
    }
    let matrix = Matrix::new(agent, suites, Accel::Tcg)?;
    for version in SMALL {
        // What was to be fetched was, or it has been said why not.
        let Ok(kernel) = Kernel::find(version, &Kernel::store()) else {
            continue;
        };
        matrix.run(&kernel, tests, summary, signals, &mut stdout());
        if summary.interrupted.is_none() {
            println!("== {} a panic is told", kernel.release);
            let name = row(&kernel, "a panic is told");
            match matrix.panics(&kernel, signals) {
                Ok(None) => summary.one(&name, true),
                Ok(Some(signal)) => summary.interrupted = Some(signal),
                Err(error) => {
                    println!("FAILED: {error:#}");
                    summary.one(&name, false);
                }
            }
        }
    }
    Ok(())
}

/// `xtask run --in-vm`: the main job, shown on another kernel.
pub fn demo(version: KernelVersion, kvm: bool, lab: Vec<String>) -> Result<ExitCode> {
    setup::ensure(Scope::Vm)?;
    let kernel = fetch(version, false)?;
    let signals = Signals::catch()?;
    let accel = accel(kvm, &kernel)?;
    let agent = build_agent()?;
    let mut userland = Userland::new()?;
    let agent = userland.built(&agent, AGENT)?;
    let mut env = vec![(BIN.to_owned(), agent)];
    if accel == Accel::Tcg {
        env.push(slow());
    }
    let plan = Plan {
        env,
        programs: vec![Program {
            name: "the lab".to_owned(),
            program: image::INIT.to_owned(),
            args: [vec!["__lab".to_owned()], lab].concat(),
            dir: "/".to_owned(),
        }],
    };
    let patience = match accel {
        Accel::Tcg => " (emulated: give it half a minute)",
        Accel::Kvm => "",
    };
    println!("  booting {}{patience}", kernel.release);
    let mut code = ExitCode::FAILURE;
    let mut booted = Booted::start(&userland, &kernel, &plan, accel)?;
    let interrupted = booted.follow(&signals, |said| match said {
        Said::Line(line) => println!("{line}"),
        Said::Word(Word::End(status)) => {
            code = u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from);
        }
        Said::Word(_) => {}
    })?;
    Ok(interrupted.map_or(code, |signal| End::Interrupted(signal).code()))
}

fn slow() -> (String, String) {
    (SLOW.to_owned(), EMULATION_FACTOR.to_string())
}

pub fn fetch(version: KernelVersion, again: bool) -> Result<Kernel> {
    let store = Kernel::store();
    if again || Kernel::find(version, &store).is_err() {
        println!("  fetching the kernel {version}");
    }
    Kernel::fetch(version, &store, again)
}

/// The same tests, over kernels.
pub struct Matrix {
    userland: Userland,
    /// Where it is in a machine.
    agent: String,
    suites: Vec<(String, String)>,
    accel: Accel,
}

impl Matrix {
    pub fn new(agent: &Path, suites: &[Built], accel: Accel) -> Result<Self> {
        let mut userland = Userland::new()?;
        for folder in READ {
            userland.folder(&cargo::root().join(folder))?;
        }
        let agent = userland.built(agent, AGENT)?;
        let suites = suites.iter().map(|built| {
            let path = userland.built(&built.executable, &built.name)?;
            Ok((built.name.clone(), path))
        });
        let suites = suites.collect::<Result<_>>()?;
        Ok(Self {
            userland,
            agent,
            suites,
            accel,
        })
    }

    /// Everything that the arguments ask for, under each of the kernels.
    fn run_all(&self, kernels: &[Kernel], args: &Args, summary: &mut Summary, signals: &Signals) {
        let wanted = |_: &str| Some(&args.filter[..]);
        if args.jobs < 2 {
            for kernel in kernels {
                self.run(kernel, wanted, summary, signals, &mut stdout());
            }
            return;
        }
        let waiting = Mutex::new(kernels.iter());
        let ended = Mutex::new(summary);
        let machine = || {
            loop {
                let kernel = lock(&waiting).next();
                let Some(kernel) = kernel else {
                    return;
                };
                let mut summary = Summary {
                    interrupted: lock(&ended).interrupted,
                    ..Summary::default()
                };
                let mut out = WholeSuites::default();
                self.run(kernel, wanted, &mut summary, signals, &mut out);
                lock(&ended).add(summary);
            }
        };
        thread::scope(|scope| {
            for _ in 0..args.jobs.min(kernels.len()) {
                scope.spawn(machine);
            }
        });
    }

    /// Runs the suites that `wanted` names, with what it says of their tests, under `kernel`.
    pub fn run<'a, S: AsRef<str> + 'a>(
        &self,
        kernel: &Kernel,
        wanted: impl Fn(&str) -> Option<&'a [S]>,
        summary: &mut Summary,
        signals: &Signals,
        out: &mut impl Write,
    ) {
        if summary.interrupted.is_some() {
            return;
        }
        let mut plan = Plan::default();
        plan.env.push((BIN.to_owned(), self.agent.clone()));
        if self.accel == Accel::Tcg {
            plan.env.push(slow());
            plan.env
                .extend(FEWER.map(|(name, count)| (name.to_owned(), count.to_owned())));
        }
        for (name, path) in &self.suites {
            let Some(filter) = wanted(name) else {
                continue;
            };
            let mut args: Vec<_> = filter.iter().map(|name| name.as_ref().to_owned()).collect();
            args.push(format!("--test-threads={THREADS}"));
            args.push("--show-output".to_owned());
            plan.programs.push(Program {
                name: name.clone(),
                program: path.clone(),
                args,
                dir: cargo::root().join(TESTS).to_string_lossy().into_owned(),
            });
        }
        let mut suite: Option<(String, Output)> = None;
        let mut titles = BTreeSet::new();
        let tell = |said| match said {
            Said::Word(Word::Begin(name)) => suite = Some((name, Output::default())),
            Said::Word(Word::End(status)) => {
                if let Some((name, output)) = suite.take() {
                    let mut count = output.count();
                    // A suite that dies says nothing of a failed test.
                    if status != 0 {
                        count.failed = count.failed.max(1);
                    }
                    for skip in output
                        .skips()
                        .filter(|skip| !may_skip(&kernel.release, skip))
                    {
                        let _gone = writeln!(out, "FAILED: nothing excuses it here: {skip}");
                        count.skipped -= 1;
                        count.failed += 1;
                    }
                    summary.suites.push((row(kernel, &name), count));
                    let _gone = out.flush();
                }
            }
            Said::Line(line) => {
                if let Some((name, output)) = &mut suite {
                    // Of suites without a test that is wanted nothing is said.
                    if line.starts_with("running ") && line != "running 0 tests" {
                        titles
                            .insert(name.clone())
                            .then(|| writeln!(out, "== {} {name}", kernel.release));
                    }
                    output.line(&line, out);
                }
            }
            Said::Word(_) => {}
        };
        let booted = Booted::start(&self.userland, kernel, &plan, self.accel);
        match booted.and_then(|mut booted| booted.follow(signals, tell)) {
            Ok(None) => {}
            Ok(Some(signal)) => summary.interrupted = Some(signal),
            Err(error) => {
                let _gone = writeln!(out, "FAILED: {}: {error:#}", kernel.release);
                let name = suite.map_or_else(|| "boot".to_owned(), |(name, _)| name);
                summary.one(&row(kernel, &name), false);
            }
        }
        let _gone = out.flush();
    }

    /// What the matrix itself relies on: a kernel that panics ends its machine, and its last words are
    /// told; and one that stalls panics. The signal, if one came before that.
    fn panics(&self, kernel: &Kernel, signals: &Signals) -> Result<Option<i32>> {
        let plan = Plan {
            programs: vec![Program {
                name: "a panic".to_owned(),
                program: "/bin/sh".to_owned(),
                args: vec!["-c".to_owned(), PANIC.to_owned()],
                dir: "/".to_owned(),
            }],
            ..Plan::default()
        };
        let mut booted = Booted::start(&self.userland, kernel, &plan, self.accel)?;
        let told = match booted.follow(signals, |_| {}) {
            Ok(None) => bail!("it did not panic, or would not if it stalled"),
            Ok(Some(signal)) => return Ok(Some(signal)),
            Err(error) => format!("{error:#}"),
        };
        ensure!(told.contains("Kernel panic - not syncing: sysrq"), "{told}");
        ensure!(told.contains("the machine ended too early"), "{told}");
        Ok(None)
    }
}

const PANIC: &str = "grep -qx 1 /proc/sys/kernel/softlockup_panic && echo c > /proc/sysrq-trigger";

/// Where several machines speak: what each says of a suite comes in one piece.
#[derive(Default)]
struct WholeSuites(Vec<u8>);

impl Write for WholeSuites {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut stdout = stdout().lock();
        stdout.write_all(&std::mem::take(&mut self.0))?;
        stdout.flush()
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn row(kernel: &Kernel, suite: &str) -> String {
    format!("{:<32} {suite}", kernel.release)
}

/// A machine at work.
struct Booted {
    qemu: Guarded,
    lines: Receiver<String>,
    dir: PathBuf,
}

enum Said {
    Word(Word),
    Line(String),
}

impl Booted {
    fn start(userland: &Userland, kernel: &Kernel, plan: &Plan, accel: Accel) -> Result<Self> {
        let dir = cargo::root().join("target/vm").join(&kernel.release);
        fs::create_dir_all(&dir)?;
        let archive = dir.join("initramfs.cpio");
        userland.write(kernel, plan, &archive)?;
        let machine = Machine {
            kernel,
            initramfs: Some(&archive),
            accel,
            cpus: CPUS,
            memory_mib: MEMORY_MIB,
            console: dir.join(CONSOLE),
            append: format!("rdinit={} -- __guest", image::INIT),
            args: [
                "-chardev",
                "stdio,id=line,signal=off",
                "-serial",
                "chardev:line",
            ]
            .map(Into::into)
            .to_vec(),
        };
        let (reader, writer) = io::pipe()?;
        let errors = File::create(dir.join(ERRORS))?;
        let mut command = machine.command();
        command.stdin(Stdio::null()).stdout(writer).stderr(errors);
        let qemu = Guarded::spawn(&mut command)?;
        // It holds the pipe's other end too.
        drop(command);
        let (sender, lines) = channel();
        // It ends with the pipe, or with whoever listens.
        thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { qemu, lines, dir })
    }

    /// Hands on what the machine says until it is done; the signal, if one came before that.
    fn follow(&mut self, signals: &Signals, mut tell: impl FnMut(Said)) -> Result<Option<i32>> {
        let end = self.listen(signals, &mut tell);
        self.qemu.end()?;
        fs::remove_file(self.dir.join("initramfs.cpio"))?;
        end.with_context(|| {
            let text = |name| fs::read(self.dir.join(name)).unwrap_or_default();
            let console = text(CONSOLE);
            format!(
                "{}the console's last lines:\n{}\n",
                String::from_utf8_lossy(&text(ERRORS)),
                last_words(&String::from_utf8_lossy(&console), 40)
            )
        })
    }

    fn listen(&mut self, signals: &Signals, tell: &mut impl FnMut(Said)) -> Result<Option<i32>> {
        let mut up = false;
        let mut limit = Deadline::after(BOOT_LIMIT);
        loop {
            if let Some(signal) = signals.caught() {
                return Ok(Some(signal));
            }
            let line = match self.lines.recv_timeout(TICK) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => match signals.caught() {
                    // Whoever stopped us may have stopped it too.
                    Some(signal) => return Ok(Some(signal)),
                    None => bail!("the machine ended too early"),
                },
                Err(RecvTimeoutError::Timeout) if !limit.passed() => continue,
                Err(RecvTimeoutError::Timeout) if !up => {
                    bail!("it did not boot within {BOOT_LIMIT:?}")
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("it has said nothing for {SILENCE_LIMIT:?}")
                }
            };
            limit = Deadline::after(SILENCE_LIMIT);
            match Word::of_line(&line) {
                Some(Word::Done) => return Ok(None),
                Some(Word::Broken(why)) => bail!("its first process cannot go on: {why}"),
                Some(word) => {
                    up = true;
                    tell(Said::Word(word));
                }
                None => tell(Said::Line(line)),
            }
        }
    }
}

/// In a machine's folder: what its kernel said, and what qemu had to complain about.
const CONSOLE: &str = "console.log";
const ERRORS: &str = "qemu.log";
const TESTS: &str = "tests";
/// What tests read of this workspace.
const READ: [&str; 3] = [TESTS, "packaging", "docs"];
const AGENT: &str = "dhcp-reclaim";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_has_is_not_skipped() {
        let renames =
            "SKIP a: Linux renames a link that is up from 6.2 on, and a guest keeps its name";
        assert!(may_skip("6.1.0-50-cloud-amd64", renames));
        assert!(!may_skip("6.12.90-amd64", renames));
        assert!(!may_skip("not a release", renames));
        assert!(may_skip(
            "7.2.0",
            "SKIP b: there is no qemu-system-x86_64 here"
        ));
        assert!(!may_skip(
            "5.10.0",
            "SKIP c: this kernel has no 802.1Q links"
        ));
    }
}
