//! Builds the kernel half, and leaves it in `OUT_DIR/dhcp-reclaim-bpf`.

use std::{
    env,
    ffi::OsString,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya_build::{Package, Toolchain};

/// `bpf` or `nightly`; chosen by looking otherwise.
const TOOLCHAIN: &str = "DHCP_RECLAIM_BPF_TOOLCHAIN";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    println!("cargo:rerun-if-env-changed={TOOLCHAIN}");
    println!("cargo:rerun-if-changed=build.rs");
    find_linker()?;

    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR")?)
        .join("../dhcp-reclaim-ebpf");
    let package = Package {
        name: "dhcp-reclaim-ebpf",
        root_dir: root
            .to_str()
            .context("the path of the workspace is not UTF-8")?,
        no_default_features: false,
        features: &["bpf"],
    };
    let toolchain = choose_toolchain()?;
    if toolchain == "bpf" {
        // A stable compiler with a prebuilt `core` for BPF. aya-ebpf alone may use unstable
        // features; any other value makes aya-build ask for build-std, which it cannot do.
        //
        // SAFETY: the build script has one thread.
        unsafe { env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf") };
    }
    aya_build::build_ebpf([package], Toolchain::Custom(toolchain))
        .context("cannot build the kernel half (see the warnings above)")
}

fn choose_toolchain() -> Result<&'static str> {
    let asked = match env::var(TOOLCHAIN) {
        Ok(name) => Some(name),
        Err(env::VarError::NotPresent) => None,
        Err(error) => bail!("{TOOLCHAIN}: {error}"),
    };
    match asked.as_deref() {
        None | Some("") => {}
        Some("bpf") if runs("bpf") => return Ok("bpf"),
        Some("nightly") if runs("nightly") => return Ok("nightly"),
        Some(name @ ("bpf" | "nightly")) => {
            bail!(
                "rustup has no toolchain `{name}` that can build for BPF ({TOOLCHAIN}): \
                 run `cargo xtask setup`"
            )
        }
        Some(name) => bail!("{TOOLCHAIN} is `{name}`: expected `bpf` or `nightly`"),
    }
    ["bpf", "nightly"]
        .into_iter()
        .find(|name| runs(name))
        .ok_or_else(|| anyhow!("no Rust toolchain that can build for BPF: run `cargo xtask setup`"))
}

/// Whether the toolchain is there, with what it needs to build `core` if that is not prebuilt.
fn runs(toolchain: &str) -> bool {
    let sysroot = Command::new("rustup")
        .args(["run", toolchain, "rustc", "--print", "sysroot"])
        .stderr(Stdio::null())
        .output();
    let Ok(sysroot) = sysroot else {
        return false;
    };
    let path = String::from_utf8_lossy(&sysroot.stdout);
    let source = PathBuf::from(path.trim()).join("lib/rustlib/src/rust/library");
    sysroot.status.success() && (toolchain == "bpf" || source.is_dir())
}

/// `cargo install` puts bpf-linker where PATH may not lead.
fn find_linker() -> Result<()> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    folders.extend(cargo_home.map(|home| home.join("bin")));
    if !folders
        .iter()
        .any(|folder| folder.join("bpf-linker").is_file())
    {
        bail!("bpf-linker is not installed: run `cargo xtask setup`");
    }
    let path: OsString = env::join_paths(folders)?;
    // SAFETY: the build script has one thread.
    unsafe { env::set_var("PATH", path) };
    Ok(())
}
