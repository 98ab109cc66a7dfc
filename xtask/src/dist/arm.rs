//! The same for aarch64: Debian's compiler has the standard library for it, and qemu runs it.
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::sandbox::{find, run};

use super::{Dist, clear, strip, test::is_static};
use crate::cargo::root;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const STD: &str = "libstd-rust-web-dev";
const QEMU: &str = "qemu-aarch64-static";

pub fn build_and_run(dist: &Dist) -> Result<()> {
    println!("== aarch64");
    let dir = dist.dir.join("aarch64");
    let sysroot = sysroot(&dir)?;
    cargo(&sysroot, &["build", "--bin", "dhcp-reclaim"])?;
    let built = root().join(format!("target/aarch64/{TARGET}/release"));
    let binary = dir.join("dhcp-reclaim");
    strip(
        "aarch64-linux-gnu-strip",
        &built.join("dhcp-reclaim"),
        &binary,
    )?;
    is_static(&binary)?;
    let qemu = find(QEMU).with_context(|| format!("there is no {QEMU}"))?;
    let told = run(Command::new(&qemu).arg(&binary).arg("--version"))?;
    let expected = format!("dhcp-reclaim {}", dist.version);
    ensure!(told.trim() == expected, "--version says {told}");
    println!("{}", told.trim());

    println!("== aarch64: doctor under qemu");
    doctor(&qemu, &binary)?;

    println!("== aarch64: unit tests under qemu");
    cargo(&sysroot, &["test", "--no-run", "--lib"])?;
    let tests = newest_test(&built.join("deps"))?;
    // As nobody: what needs namespaces of its own is not for an emulated system call.
    let told = run(Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&qemu)
        .arg(&tests)
        .args(["--skip", "core::sim"])
        // It starts itself, which only qemu could.
        .args(["--skip", "a_panic_gives_the_terminal_back"])
        .current_dir(root().join("dhcp-reclaim-agent")))?;
    let result = told.lines().rfind(|line| line.starts_with("test result"));
    println!("{}", result.context("the tests say nothing")?);
    Ok(())
}

/// It looks at all that it would, whatever it finds: qemu knows no bpf(2).
fn doctor(qemu: &Path, binary: &Path) -> Result<()> {
    let output = Command::new(qemu)
        .arg(binary)
        .args(["doctor", "--json"])
        .output()?;
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "doctor: {}: {err}",
        output.status
    );
    let findings: Result<Vec<serde_json::Value>, _> =
        out.lines().map(serde_json::from_str).collect();
    let findings = findings.with_context(|| format!("doctor says no JSON: {out}{err}"))?;
    for check in ["kernel", "bpf", "bpffs", "bridge"] {
        let found = findings.iter().any(|finding| finding["check"] == check);
        ensure!(found, "doctor did not look at {check}: {findings:?}");
    }
    println!("{} findings", findings.len());
    Ok(())
}

/// Debian's rustc, with its library for this target beside that of the host. Its package is of another
/// architecture, and is unpacked here rather than installed.
fn sysroot(dir: &Path) -> Result<PathBuf> {
    let sysroot = dir.join("sysroot");
    let rustlib = sysroot.join("lib/rustlib");
    if rustlib.join(TARGET).exists() {
        return Ok(sysroot);
    }
    let apt = dir.join("apt");
    for folder in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(apt.join(folder))?;
    }
    let options = [
        "APT::Architectures::=amd64".to_owned(),
        "APT::Architectures::=arm64".to_owned(),
        format!("Dir::State::lists={}", apt.join("lists").display()),
        format!("Dir::Cache={}", apt.join("cache").display()),
        "Acquire::Languages=none".to_owned(),
        "APT::Sandbox::User=".to_owned(),
    ];
    let apt_get = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(options.iter().flat_map(|option| ["-o", option]));
        command.args(args).current_dir(&apt);
        run(&mut command)
    };
    let version = run(Command::new("dpkg-query").args(["--show", "--showformat=${Version}", STD]))?;
    apt_get(&["update"])?;
    apt_get(&["download", &format!("{STD}:arm64={version}")])?;
    let unpacked = dir.join("unpacked");
    clear(&unpacked)?;
    for entry in fs::read_dir(&apt)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg").arg("-x").arg(path).arg(&unpacked))?;
        }
    }
    clear(&rustlib)?;
    std::os::unix::fs::symlink(
        unpacked.join("usr/lib/rustlib").join(TARGET),
        rustlib.join(TARGET),
    )?;
    Ok(sysroot)
}

/// The toolchain that also builds the kernel half: it is the one that this library belongs to.
fn cargo(sysroot: &Path, args: &[&str]) -> Result<()> {
    let (verb, rest) = args.split_first().context("no command")?;
    let flags = format!(
        "-C target-feature=+crt-static --sysroot={}",
        sysroot.display()
    );
    let status = Command::new("cargo")
        .current_dir(root())
        .env("RUSTUP_TOOLCHAIN", "bpf")
        .env_remove("CARGO")
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags)
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
            "aarch64-linux-gnu-gcc",
        )
        .arg(verb)
        .args([
            "--release",
            "--target",
            TARGET,
            "--target-dir",
            "target/aarch64",
        ])
        .args(["--package", "dhcp-reclaim-agent"])
        .args(rest)
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cannot {verb} for {TARGET}");
    Ok(())
}

fn newest_test(deps: &Path) -> Result<PathBuf> {
    let mut newest = None;
    for entry in fs::read_dir(deps)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("dhcp_reclaim_agent-") && !name.contains('.') {
            newest = newest.max(Some((entry.metadata()?.modified()?, entry.path())));
        }
    }
    let (_, path) = newest.context("cargo built no unit tests")?;
    Ok(path)
}
