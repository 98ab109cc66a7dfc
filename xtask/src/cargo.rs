//! Cargo, and what it built.
use std::{
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// The workspace's root.
pub fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// An executable that cargo built.
#[derive(Debug)]
pub struct Built {
    /// `bin`, `lib`, `test` and so on.
    pub kind: String,
    pub name: String,
    /// The package's folder, as seen from the root.
    pub package: String,
    pub executable: PathBuf,
}

/// Runs a build and returns its executables; what cargo says goes to our standard error, but for
/// what the inner build of the kernel half passes off as warnings.
pub fn build(args: &[&str]) -> Result<Vec<Built>> {
    const INNER: &str = "warning: dhcp-reclaim-agent@";
    let mut child = cargo()
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("no pipe")?;
    let stderr = child.stderr.take().context("no pipe")?;
    let talk = std::thread::spawn(move || {
        let mut inner = Vec::new();
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if line.starts_with(INNER) {
                inner.push(line);
            } else {
                eprintln!("{line}");
            }
        }
        inner
    });
    let mut built = Vec::new();
    for line in BufReader::new(stdout).lines() {
        let message: Value = serde_json::from_str(&line?)?;
        built.extend(parse(&message));
    }
    let status = child.wait()?;
    // It ends with the build's standard error; a panic there would only have lost talk.
    let inner = talk.join().unwrap_or_default();
    if !status.success() {
        inner.iter().for_each(|line| eprintln!("{line}"));
    }
    ensure!(status.success(), "`cargo {}` failed", args.join(" "));
    Ok(built)
}

/// The agent, as a developer's build: it shares its artifacts with the tests.
pub fn build_agent() -> Result<PathBuf> {
    let built = build(&[
        "build",
        "--package",
        "dhcp-reclaim-agent",
        "--bin",
        "dhcp-reclaim",
    ])?;
    built
        .into_iter()
        .find(|built| built.kind == "bin" && built.name == "dhcp-reclaim")
        .map(|built| built.executable)
        .context("cargo built no dhcp-reclaim")
}

fn parse(message: &Value) -> Option<Built> {
    let executable = message.get("executable")?.as_str()?;
    let target = message.get("target")?;
    let manifest = Path::new(message.get("manifest_path")?.as_str()?);
    let folder = manifest.parent()?.strip_prefix(root()).ok()?;
    Some(Built {
        kind: target.get("kind")?.get(0)?.as_str()?.to_owned(),
        name: target.get("name")?.as_str()?.to_owned(),
        package: folder.to_string_lossy().into_owned(),
        executable: executable.into(),
    })
}
