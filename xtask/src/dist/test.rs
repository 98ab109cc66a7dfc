//! `cargo xtask dist --test`: installs and runs what was built, as far as this machine can.
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::BIN,
    boot::kernel::mirror,
    sandbox::{find, run},
};
use nix::unistd::Uid;

use super::{Dist, clear, package};
use crate::cargo::{self, root};

/// What is in the chroot besides a minimal Debian: a service manager, a manual's reader, and what a
/// lab takes.
const PACKAGES: &str = "systemd,systemd-sysv,man-db,iproute2,udhcpc,dnsmasq-base";
const SUITE: &str = "bookworm";
/// Where an agent of before an upgrade is, for the test of that.
const OLD: &str = "DHCP_RECLAIM_OLD_BIN";

pub fn all(dist: &Dist) -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "these tests make chroots and containers: run them as root"
    );
    let work = dist.dir.join("work");
    clear(&work)?;
    say("the binary needs nothing");
    is_static(&dist.binary)?;
    say("the image is built, and its binary runs in an empty root");
    image(dist, &work)?;
    say("the manifest fits Kubernetes' schemas");
    manifest(&dist.dir)?;
    let base = chroot(&dist.dir)?;
    say("the .deb is installed in a chroot, and goes without a trace");
    script(
        INSTALL,
        "install.sh",
        &work,
        &[
            base.as_os_str(),
            work.as_os_str(),
            dist.deb.as_os_str(),
            dist.version.as_ref(),
        ],
    )?;
    say("a new user's way, in a container with systemd");
    booted(dist, &base, &work)?;
    say("an upgrade while VMs come and go");
    upgrade(dist)
}

fn say(what: &str) {
    println!("== {what}");
}

/// No loader and no library: what the kernel runs by itself.
pub fn is_static(binary: &Path) -> Result<()> {
    let readelf = find("readelf").context("there is no readelf (binutils)")?;
    let told = run(Command::new(readelf)
        .args(["--wide", "--program-headers", "--dynamic"])
        .arg(binary))?;
    for dynamic in ["INTERP", "(NEEDED)"] {
        ensure!(
            !told.contains(dynamic),
            "{}: {dynamic} in\n{told}",
            binary.display()
        );
    }
    Ok(())
}

const EMPTY: &str = include_str!("empty.sh");
const INSTALL: &str = include_str!("install.sh");
const BOOTED: &str = include_str!("booted.sh");

/// Builds the container image, and runs what is in it as a runtime would: with nothing around it but
/// the host's network and BPF file system.
fn image(dist: &Dist, work: &Path) -> Result<()> {
    let buildah = find("buildah").context("there is no buildah")?;
    let store = dist.dir.join("buildah");
    clear(&store)?;
    let buildah = |args: &[&str]| {
        let mut command = Command::new(&buildah);
        // No driver that needs something of this kernel.
        command
            .args(["--storage-driver=vfs", "--root"])
            .arg(store.join("root"));
        command.arg("--runroot").arg(store.join("run")).args(args);
        command.current_dir(dist.dir.join("oci"));
        Ok::<_, anyhow::Error>(run(&mut command)?.trim().to_owned())
    };
    buildah(&["build", "--isolation=chroot", "--tag=dhcp-reclaim", "."])?;
    let container = buildah(&["from", "dhcp-reclaim"])?;
    let mounted = buildah(&["mount", &container])?;
    let files =
        run(Command::new("find").args([mounted.as_str(), "-type", "f", "-printf", "%P\n"]))?;
    ensure!(
        files.trim() == "usr/bin/dhcp-reclaim",
        "the image has more than the binary:\n{files}"
    );
    script(
        EMPTY,
        "empty.sh",
        work,
        &[
            work.as_os_str(),
            Path::new(&mounted).join("usr/bin/dhcp-reclaim").as_os_str(),
            dist.version.as_ref(),
        ],
    )?;
    clear(&store)
}

/// Runs a script in mount, pid and net namespaces of its own.
fn script(text: &str, name: &str, work: &Path, args: &[&std::ffi::OsStr]) -> Result<()> {
    let log = work.with_file_name(format!("{name}.log"));
    let file = fs::File::create(&log)?;
    let status = Command::new("unshare")
        .args(["--mount", "--pid", "--net", "--fork", "--kill-child"])
        .args(["sh", "-c", text, name])
        .args(args)
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .context("cannot run unshare (util-linux)")?;
    ensure!(
        status.success(),
        "{name}: {status}:\n{}",
        fs::read_to_string(&log)?
    );
    Ok(())
}

/// A minimal Debian from where this machine gets its own, made once.
fn chroot(dir: &Path) -> Result<PathBuf> {
    let base = dir.join("chroot");
    if base.join("usr/bin/systemctl").exists() {
        return Ok(base);
    }
    say("a minimal Debian, for the first time");
    let fresh = dir.join("chroot.new");
    clear(&fresh)?;
    let debootstrap = find("debootstrap").context("there is no debootstrap")?;
    run(Command::new(debootstrap)
        .args(["--variant=minbase", &format!("--include={PACKAGES}"), SUITE])
        .arg(&fresh)
        .arg(mirror()?))?;
    clear(&base)?;
    fs::remove_dir(&base)?;
    fs::rename(&fresh, &base)?;
    Ok(base)
}

/// Boots systemd on a copy of the chroot that goes with it, and has `booted.sh` run there.
fn booted(dist: &Dist, base: &Path, work: &Path) -> Result<()> {
    let (given, out) = (work.join("dist"), work.join("out"));
    clear(&given)?;
    clear(&out)?;
    fs::copy(&dist.deb, given.join("package.deb"))?;
    fs::write(given.join("booted.sh"), BOOTED)?;
    let unit = given.join("lab.service");
    fs::write(
        &unit,
        "[Unit]\nAfter=multi-user.target\n\
         [Service]\nType=oneshot\nExecStart=/bin/sh /dist/booted.sh\n",
    )?;
    let nspawn = find("systemd-nspawn").context("there is no systemd-nspawn")?;
    let bind = |flag: &str, from: &Path, to: &str| format!("--{flag}={}:{to}", from.display());
    let console = run(Command::new("timeout")
        .args(["--kill-after=10", "300"])
        // The whole of /sys, with a place for a BPF file system.
        .env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "yes")
        .arg(nspawn)
        .args(["--quiet", "--boot", "--volatile=overlay", "--register=no"])
        .args(["--keep-unit", "--private-network", "--capability=all"])
        .arg("--system-call-filter=bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self")
        .arg(format!("--machine=dhcp-reclaim-{}", std::process::id()))
        .arg(format!("--directory={}", base.display()))
        .arg(bind("bind-ro", &given, "/dist"))
        .arg(bind("bind", &out, "/out"))
        .arg(bind("bind-ro", &unit, "/etc/systemd/system/lab.service"))
        .arg("systemd.wants=lab.service"));
    let log = fs::read_to_string(out.join("log")).unwrap_or_default();
    let code = fs::read_to_string(out.join("code")).unwrap_or_default();
    match console {
        _ if code.trim() == "0" => Ok(()),
        Ok(console) if log.is_empty() => Err(anyhow::anyhow!("it did not boot:\n{console}")),
        Ok(_) => Err(anyhow::anyhow!("exit code {code:?}:\n{log}")),
        Err(error) => Err(error.context(format!("exit code {code:?}:\n{log}"))),
    }
}

/// The DaemonSet against the schemas of the newest Kubernetes that the validator brings along.
fn manifest(dir: &Path) -> Result<()> {
    const VALIDATOR: &str = "kubernetes-validate==1.37.0";
    let venv = dir.join("venv");
    let validator = venv.join("bin/kubernetes-validate");
    if !validator.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", VALIDATOR]))?;
    }
    let manifest = root().join("packaging/kubernetes/dhcp-reclaim.yaml");
    run(Command::new(&validator).arg("--strict").arg(&manifest))?;
    // The judge is judged: a misspelt field must not pass.
    let text = fs::read_to_string(&manifest)?;
    let wrong = dir.join("wrong.yaml");
    fs::write(
        &wrong,
        text.replace("readOnlyRootFilesystem", "readOnlyRoot"),
    )?;
    let told = run(Command::new(&validator).arg("--strict").arg(&wrong));
    ensure!(told.is_err(), "the validator takes anything");
    Ok(())
}

/// The lab's test of it, with the same code under an older version's number as what is replaced.
fn upgrade(dist: &Dist) -> Result<()> {
    let old = older(dist)?;
    let built = cargo::build(&[
        "test",
        "--no-run",
        "-p",
        "dhcp-reclaim-tests",
        "--test",
        "upgrade",
    ])?;
    let test = built
        .into_iter()
        .find(|built| built.name == "upgrade")
        .context("cargo built no test of upgrades")?;
    let told = run(Command::new(&test.executable)
        .current_dir(root().join("tests"))
        .args(["--nocapture"])
        .env(BIN, &dist.binary)
        .env(OLD, &old))?;
    ensure!(!told.contains("SKIP"), "{told}");
    for line in told.lines().filter(|line| line.starts_with("NOTE ")) {
        println!("{line}");
    }
    Ok(())
}

/// The same code, as version 0.0.9, out of its own .deb.
fn older(dist: &Dist) -> Result<PathBuf> {
    const VERSION: &str = "0.0.9";
    let source = dist.dir.join("older");
    clear(&source)?;
    let tracked = run(Command::new("git").arg("-C").arg(root()).arg("ls-files"))?;
    for file in tracked.lines() {
        let to = source.join(file);
        fs::create_dir_all(to.parent().context("no folder")?)?;
        match fs::copy(root().join(file), &to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(file.to_owned());
            }
            _ => {}
        }
    }
    let manifest = source.join("Cargo.toml");
    let text = fs::read_to_string(&manifest)?;
    let [ours, older] = [&dist.version, VERSION].map(|version| format!("version = \"{version}\""));
    ensure!(text.contains(&ours), "the workspace's version is elsewhere");
    // Its first place is the workspace's own.
    fs::write(&manifest, text.replacen(&ours, &older, 1))?;
    let built = source.join("target/dist/bin/dhcp-reclaim");
    let status = cargo::cargo()
        .current_dir(&source)
        .env("CARGO_TARGET_DIR", root().join("target"))
        .args([
            "build",
            "--offline",
            "-p",
            "dhcp-reclaim-agent",
            "--bin",
            "dhcp-reclaim",
        ])
        .status()?;
    ensure!(status.success(), "cannot build version {VERSION}");
    super::strip("strip", &root().join("target/debug/dhcp-reclaim"), &built)?;
    for made in ["pages", "dhcp-reclaim.cdx.json"] {
        let to = source.join("target/dist");
        run(Command::new("cp")
            .arg("-r")
            .arg(dist.dir.join(made))
            .arg(&to))?;
    }
    let deb = dist.dir.join("work/older.deb");
    package(&source, &deb, VERSION)?;
    let unpacked = dist.dir.join("work/older");
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&unpacked))?;
    Ok(unpacked.join("usr/bin/dhcp-reclaim"))
}
