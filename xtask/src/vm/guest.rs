//! The first process of a machine under test: makes it a home, runs what it is told to, powers off.
use std::{
    ffi::CString,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::boot::initramfs::MODULES;
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::report::Word;

/// Where the machine finds what it is to do.
pub const PLAN: &str = "/plan.json";
/// The line to whoever booted it; the other one is the kernel's console.
const LINE: &str = "/dev/ttyS1";

#[derive(Default, Serialize, Deserialize)]
pub struct Plan {
    pub env: Vec<(String, String)>,
    pub programs: Vec<Program>,
}

#[derive(Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub program: String,
    pub args: Vec<String>,
    pub dir: String,
}

pub fn main() -> Result<ExitCode> {
    ensure!(
        Pid::this().as_raw() == 1,
        "this is the first process of a machine that `cargo xtask vm` boots"
    );
    // Nobody is left to hear of an error if the line itself is what fails, but the console.
    if let Err(error) = live() {
        eprintln!("{error:#}");
    }
    reboot(RebootMode::RB_POWER_OFF)?;
    Ok(ExitCode::FAILURE)
}

fn live() -> Result<()> {
    for (kind, path) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/run"),
        ("devpts", "/dev/pts"),
    ] {
        fs::create_dir_all(path)?;
        mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {path}"))?;
    }
    let mut line = line()?;
    let told = work(&mut line);
    let last = told.map_or_else(|error| Word::Broken(format!("{error:#}")), |()| Word::Done);
    line.write_all(last.to_line()?.as_bytes())?;
    nix::sys::termios::tcdrain(&line).context("tcdrain")
}

fn line() -> Result<File> {
    let line = File::options().write(true).read(true).open(LINE);
    let line = line.context(LINE)?;
    let mut raw = tcgetattr(&line).context(LINE)?;
    cfmakeraw(&mut raw);
    tcsetattr(&line, SetArg::TCSANOW, &raw).context(LINE)?;
    Ok(line)
}

fn work(line: &mut File) -> Result<()> {
    load_modules()?;
    let plan: Plan = serde_json::from_slice(&fs::read(PLAN).context(PLAN)?)?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    line.write_all(Word::Up(release.trim().to_owned()).to_line()?.as_bytes())?;
    for program in &plan.programs {
        let begin = Word::Begin(program.name.clone());
        line.write_all(begin.to_line()?.as_bytes())?;
        let status = one(program, &plan.env, line).with_context(|| program.name.clone())?;
        line.write_all(Word::End(status).to_line()?.as_bytes())?;
    }
    Ok(())
}

/// Their names are in the order in which they need one another.
fn load_modules() -> Result<()> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(MODULES).context(MODULES)? {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        finit_module(&file, &CString::default(), ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

fn one(program: &Program, env: &[(String, String)], line: &mut File) -> Result<i32> {
    fs::create_dir_all(&program.dir)?;
    let (reader, writer) = std::io::pipe()?;
    let mut command = Command::new(Path::new(&program.program));
    command
        .args(&program.args)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
        .env("HOME", "/root")
        .envs(env.iter().cloned())
        .current_dir(&program.dir)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn()?;
    // It holds the pipe's other end too.
    drop(command);
    for text in BufReader::new(reader).split(b'\n') {
        let mut text = text?;
        text.push(b'\n');
        line.write_all(&text)?;
    }
    let status = child.wait()?;
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    Ok(code.unwrap_or(-1))
}
