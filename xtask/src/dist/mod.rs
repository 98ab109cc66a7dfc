//! `cargo xtask dist`: what is handed to others, in `target/dist`.
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::sandbox::{find, run};

use crate::{
    cargo::{cargo, root},
    setup::{self, Scope},
};

mod arm;
mod sbom;
mod test;

#[derive(clap::Args)]
pub struct Args {
    /// Install and run what was built, as far as this machine can: a chroot, a container, a lab
    #[arg(long)]
    test: bool,
    /// Build for aarch64 too, and run that under qemu
    #[arg(long)]
    aarch64: bool,
}

const TARGET: &str = "x86_64-unknown-linux-gnu";
const CARGO_DEB: &str = "3.8.0";
const CARGO_DENY: &str = "0.20.2";

/// What was built.
pub struct Dist {
    pub dir: PathBuf,
    pub version: String,
    pub binary: PathBuf,
    pub deb: PathBuf,
    pub tarball: PathBuf,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure(match args.test || args.aarch64 {
        true => Scope::Dist,
        false => Scope::Build,
    })?;
    let dist = build()?;
    if args.aarch64 {
        arm::build_and_run(&dist)?;
    }
    if args.test {
        test::all(&dist)?;
    }
    println!();
    for file in [&dist.binary, &dist.deb, &dist.tarball] {
        let bytes = fs::metadata(file)?.len();
        println!("{:>8} KiB  {}", bytes / 1024, file.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn build() -> Result<Dist> {
    setup::ensure_cargo_tool("cargo-deb", CARGO_DEB)?;
    setup::ensure_cargo_tool("cargo-deny", CARGO_DENY)?;
    let dir = root().join("target/dist");
    fs::create_dir_all(&dir)?;
    check_dependencies()?;
    println!("== a binary that needs nothing");
    let binary = dir.join("bin/dhcp-reclaim");
    static_binary(TARGET, &binary)?;
    println!("== man pages and completions");
    let pages = dir.join("pages");
    clear(&pages)?;
    run(cargo()
        .args(["run", "--quiet", "--package", "dhcp-reclaim-agent"])
        .args(["--example", "pages", "--"])
        .arg(&pages))?;
    println!("== SBOM");
    let metadata = sbom::metadata(TARGET)?;
    let version = sbom::version(&metadata)?;
    let bill = sbom::of(&metadata)?;
    let bill_file = dir.join("dhcp-reclaim.cdx.json");
    fs::write(&bill_file, serde_json::to_vec_pretty(&bill)?)?;

    println!("== .deb");
    let deb = dir.join(format!("dhcp-reclaim_{version}_amd64.deb"));
    package(root(), &deb, &version)?;
    println!("== tarball and image");
    let tarball = tarball(&dir, &version)?;
    image_context(&dir)?;
    Ok(Dist {
        dir,
        version,
        binary,
        deb,
        tarball,
    })
}

/// Licences, duplicates and origins; advisories where their database is.
fn check_dependencies() -> Result<()> {
    println!("== licences and origins of what is linked in");
    let mut checks = vec!["licenses", "bans", "sources"];
    let home = env::var_os("HOME").unwrap_or_default();
    let default = || Path::new(&home).join(".cargo");
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(default, PathBuf::from);
    if cargo_home.join("advisory-dbs").is_dir() {
        checks.push("advisories");
    } else {
        println!(
            "advisories are not looked at: their database is not on this machine \
             (`cargo deny fetch db` fetches it from a git host)"
        );
    }
    // What is linked on other systems is not here yet, and is judged, too.
    run(cargo().args(["fetch", "--locked"]))?;
    // Offline: what is in the lock file is what is judged.
    let told = run(cargo().args(["deny", "--offline", "check"]).args(checks))?;
    print!("{told}");
    Ok(())
}

/// Built and stripped, with the C library in it.
fn static_binary(target: &str, to: &Path) -> Result<()> {
    let flags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        target.to_uppercase().replace('-', "_")
    );
    // By the target's own variable: build scripts and the kernel half are not concerned.
    let status = cargo()
        .env(flags, "-C target-feature=+crt-static")
        .args(["build", "--release", "--target", target])
        .args(["--package", "dhcp-reclaim-agent", "--bin", "dhcp-reclaim"])
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cannot build for {target}");
    let built = root().join(format!("target/{target}/release/dhcp-reclaim"));
    strip("strip", &built, to)
}

fn strip(program: &str, from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    let strip = find(program).with_context(|| format!("there is no {program} (binutils)"))?;
    run(Command::new(strip).arg("-o").arg(to).arg(from)).map(drop)
}

/// Packs what is in a workspace's `target/dist`; `deb` is where to.
fn package(workspace: &Path, deb: &Path, version: &str) -> Result<()> {
    let mut command = cargo();
    command
        .current_dir(workspace)
        .args(["deb", "--no-build", "--no-strip", "--quiet"])
        .args(["--package", "dhcp-reclaim-agent"])
        .args(["--deb-version", version])
        .arg("--output")
        .arg(deb);
    run(&mut command).map(drop)
}

/// The .deb has them, too.
const EXAMPLES: [&str; 4] = [
    "packaging/prometheus/dhcp-reclaim.rules.yml",
    "packaging/grafana/dhcp-reclaim.json",
    "packaging/kubernetes/dhcp-reclaim.yaml",
    "packaging/oci/Containerfile",
];

fn tarball(dir: &Path, version: &str) -> Result<PathBuf> {
    let name = format!("dhcp-reclaim-{version}-{TARGET}");
    let folder = dir.join(&name);
    clear(&folder)?;
    let packaging = root().join("packaging");
    // What the pages tell people to use, by the paths that they name.
    for example in EXAMPLES {
        let to = folder.join(example);
        fs::create_dir_all(to.parent().context("no folder")?)?;
        fs::copy(root().join(example), to).with_context(|| example.to_owned())?;
    }
    for (from, to) in [
        (dir.join("bin/dhcp-reclaim"), "dhcp-reclaim"),
        (
            packaging.join("systemd/dhcp-reclaim.service"),
            "dhcp-reclaim.service",
        ),
        (
            packaging.join("config/dhcp-reclaim.toml"),
            "dhcp-reclaim.toml",
        ),
        (dir.join("dhcp-reclaim.cdx.json"), "dhcp-reclaim.cdx.json"),
        (root().join("README.md"), "README.md"),
        (root().join("ARCHITECTURE.md"), "ARCHITECTURE.md"),
        (root().join("LICENSE"), "LICENSE"),
        (root().join("LICENSE-APACHE"), "LICENSE-APACHE"),
        (root().join("LICENSE-MIT"), "LICENSE-MIT"),
    ] {
        fs::copy(&from, folder.join(to)).with_context(|| from.display().to_string())?;
    }
    for (from, to) in [(dir.join("pages"), "man"), (root().join("docs"), "docs")] {
        fs::create_dir_all(folder.join(to))?;
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), folder.join(to).join(entry.file_name()))?;
            }
        }
    }
    let tarball = dir.join(format!("{name}.tar.gz"));
    run(Command::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg("-C")
        .arg(dir)
        .arg("-czf")
        .arg(&tarball)
        .arg(&name))?;
    fs::remove_dir_all(&folder)?;
    Ok(tarball)
}

/// A folder that a container builder is given: it has the binary and nothing else to run.
fn image_context(dir: &Path) -> Result<()> {
    let context = dir.join("oci");
    clear(&context)?;
    fs::copy(
        root().join("packaging/oci/Containerfile"),
        context.join("Containerfile"),
    )?;
    fs::copy(dir.join("bin/dhcp-reclaim"), context.join("dhcp-reclaim"))?;
    Ok(())
}

/// Empty, and there.
fn clear(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| dir.display().to_string());
        }
        _ => {}
    }
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())
}
