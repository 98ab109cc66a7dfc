//! `cargo xtask setup`: from a fresh Debian 12 with rustup to where everything builds and runs.
use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _, stderr, stdin},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use dhcp_reclaim_tests::{sandbox::find, watch::tail};
use nix::unistd::Uid;

#[derive(clap::Args)]
pub struct Args {
    /// Only report; fails if something is missing
    #[arg(long)]
    check: bool,
    /// Do not ask before installing
    #[arg(long)]
    yes: bool,
    /// Only what building needs, not the lab's servers and clients, nor qemu
    #[arg(long)]
    build_only: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Build,
    /// With what building needs.
    Lab,
    /// With all of the lab.
    Vm,
    /// With all of the lab.
    Bench,
    /// With all of the lab and machines.
    Dist,
    /// All but what packaging needs.
    All,
}

impl Scope {
    fn includes(self, need: Self) -> bool {
        match need {
            Self::Build => true,
            Self::Lab => self != Self::Build,
            Self::Vm => matches!(self, Self::Vm | Self::Dist | Self::All),
            Self::Bench => matches!(self, Self::Bench | Self::All),
            Self::Dist | Self::All => self == need,
        }
    }
}

struct Need {
    what: &'static str,
    why: &'static str,
    scope: Scope,
    /// Whether it is there.
    detect: fn(&Need) -> bool,
    packages: &'static [&'static str],
    then: Then,
}

/// What remains to be done once the packages are there.
enum Then {
    Nothing,
    LinkToolchain,
    InstallLinker,
}

const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";

/// A program that is its package's only reason.
macro_rules! program {
    ($name:literal, $package:literal, $why:literal) => {
        program!($name, $package, $why, Scope::Lab)
    };
    ($name:literal, $package:literal, $why:literal, $scope:expr) => {
        Need {
            what: $name,
            why: $why,
            scope: $scope,
            detect: |need| find(need.what).is_some(),
            packages: &[$package],
            then: Then::Nothing,
        }
    };
}

const NEEDS: &[Need] = &[
    Need {
        what: "a C++ compiler",
        why: "links Rust programs, and builds bpf-linker's LLVM glue",
        scope: Scope::Build,
        detect: |_| find("c++").is_some() && find("cc").is_some(),
        packages: &["g++"],
        then: Then::Nothing,
    },
    Need {
        what: "BPF standard library",
        why: "compiles the kernel half (Debian's stable rustc has it; a nightly with rust-src does too)",
        scope: Scope::Build,
        detect: |_| bpf_toolchain() || nightly_with_source(),
        packages: &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"],
        then: Then::LinkToolchain,
    },
    Need {
        what: "bpf-linker",
        why: "links the kernel half into one BPF object",
        scope: Scope::Build,
        detect: |_| linker_runs(),
        packages: &[
            "llvm-22-dev",
            "libpolly-22-dev",
            "libzstd-dev",
            "zlib1g-dev",
        ],
        then: Then::InstallLinker,
    },
    program!("dnsmasq", "dnsmasq-base", "a DHCP server of the lab"),
    program!("dhcp_release", "dnsmasq-utils", "gives leases back by hand"),
    program!("kea-dhcp4", "kea-dhcp4-server", "a DHCP server of the lab"),
    program!("dhcpd", "isc-dhcp-server", "a DHCP server of the lab"),
    program!("udhcpc", "udhcpc", "a DHCP client of the lab"),
    program!("dhclient", "isc-dhcp-client", "a DHCP client of the lab"),
    program!("dhcpcd", "dhcpcd-base", "a DHCP client of the lab"),
    program!(
        "dhcrelay",
        "isc-dhcp-relay",
        "stands between the lab's guests and a server"
    ),
    program!("ip", "iproute2", "makes the lab's links"),
    program!("nft", "nftables", "puts filters into the lab's way"),
    program!("busybox", "busybox", "pings in the lab"),
    program!(
        "bpftool",
        "bpftool",
        "shows what is attached, and what is left"
    ),
    program!("tmux", "tmux", "a terminal for the tests of `top`"),
    program!("tcpdump", "tcpdump", "looks at a lab's wires by hand"),
    program!("arping", "iputils-arping", "asks a lab's VMs by hand"),
    program!("curl", "curl", "fetches what documents say to fetch"),
    program!("jq", "jq", "reads JSON, as documents do"),
    program!("ethtool", "ethtool", "turns a link's offloads off"),
    program!(
        "promtool",
        "prometheus",
        "checks metrics and alert rules, and scrapes a lab's agent"
    ),
    program!("setpriv", "util-linux", "takes rights away in the lab"),
    program!("script", "bsdutils", "gives the lab's commands a terminal"),
    program!(
        "qemu-system-x86_64",
        "qemu-system-x86",
        "boots other kernels for `cargo xtask vm`, and real guests",
        Scope::Vm
    ),
    program!(
        "xz",
        "xz-utils",
        "unpacks the modules of such a kernel",
        Scope::Vm
    ),
    program!(
        "debootstrap",
        "debootstrap",
        "makes the Debian that packages are tried in",
        Scope::Dist
    ),
    program!(
        "systemd-nspawn",
        "systemd-container",
        "boots that Debian",
        Scope::Dist
    ),
    program!(
        "buildah",
        "buildah",
        "builds the container image",
        Scope::Dist
    ),
    Need {
        what: "python3",
        why: "runs the validator of Kubernetes' manifests",
        scope: Scope::Dist,
        detect: |need| find(need.what).is_some(),
        packages: &["python3", "python3-venv"],
        then: Then::Nothing,
    },
    Need {
        what: "aarch64-linux-gnu-gcc",
        why: "links for aarch64",
        scope: Scope::Dist,
        detect: |need| {
            find(need.what).is_some() && PathBuf::from("/usr/aarch64-linux-gnu/lib/libc.a").exists()
        },
        packages: &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        then: Then::Nothing,
    },
    program!(
        "qemu-aarch64-static",
        "qemu-user-static",
        "runs what was built for aarch64",
        Scope::Dist
    ),
    program!(
        "perfdhcp",
        "kea-admin",
        "asks a server for leases as fast as it can, for `cargo xtask bench`",
        Scope::Bench
    ),
    program!(
        "fping",
        "fping",
        "sweeps addresses, as a neighbour in `cargo xtask bench`",
        Scope::Bench
    ),
    program!(
        "arp-scan",
        "arp-scan",
        "sweeps addresses, as a neighbour in `cargo xtask bench`",
        Scope::Bench
    ),
];

pub fn main(args: &Args) -> Result<ExitCode> {
    let scope = match args.build_only {
        true => Scope::Build,
        false => Scope::All,
    };
    let missing = report(scope);
    if missing.is_empty() {
        println!("everything is there");
        return Ok(ExitCode::SUCCESS);
    }
    if args.check {
        println!(
            "\n{} missing; `cargo xtask setup` installs what is",
            missing.len()
        );
        return Ok(ExitCode::FAILURE);
    }
    install(&missing, args.yes)?;
    Ok(ExitCode::SUCCESS)
}

/// What every other task calls first: silent when there is nothing to do.
pub fn ensure(scope: Scope) -> Result<()> {
    let missing = missing(scope);
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        println!("  missing  {:<22} {}", need.what, need.why);
    }
    install(&missing, false)
}

/// For tasks that few need: a subcommand of cargo's, from its registry.
pub fn ensure_cargo_tool(name: &str, version: &str) -> Result<()> {
    let there = Command::new(name)
        // As cargo would call it.
        .args([name.trim_start_matches("cargo-"), "--version"])
        .env("PATH", path_with_cargo()?)
        .output();
    if there.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    println!("  cargo: building {name} {version} (a minute or two)");
    let mut command = Command::new("cargo");
    command
        .args(["install", name, "--version", version, "--locked"])
        .current_dir(env::temp_dir())
        .env_remove("CARGO_TARGET_DIR");
    stream("cargo", &mut command, |line| {
        ["Installed", "error"]
            .iter()
            .any(|start| line.trim_start().starts_with(start))
    })
    .with_context(|| {
        format!("cannot install {name}; by hand: cargo install {name} --version {version} --locked")
    })
}

/// Where `cargo install` puts programs too.
fn path_with_cargo() -> Result<std::ffi::OsString> {
    let home = env::var_os("HOME").unwrap_or_default();
    let default = || PathBuf::from(home).join(".cargo");
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(default, PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain([cargo_home.join("bin")]);
    Ok(env::join_paths(folders)?)
}

fn missing(scope: Scope) -> Vec<&'static Need> {
    let needs = NEEDS.iter().filter(|need| scope.includes(need.scope));
    needs.filter(|need| !(need.detect)(need)).collect()
}

fn report(scope: Scope) -> Vec<&'static Need> {
    let missing = missing(scope);
    for need in NEEDS.iter().filter(|need| scope.includes(need.scope)) {
        let lacks = missing.iter().any(|this| this.what == need.what);
        let state = if lacks { "missing" } else { "there" };
        println!("  {state:<7}  {:<22} {}", need.what, need.why);
    }
    missing
}

fn install(missing: &[&Need], yes: bool) -> Result<()> {
    let wanted: BTreeSet<_> = missing
        .iter()
        .flat_map(|need| need.packages)
        .copied()
        .collect();
    let packages = not_installed(wanted);
    if !packages.is_empty() {
        let list = packages.iter().copied().collect::<Vec<_>>().join(" ");
        println!("\nto install with apt: {list}");
        for need in missing {
            match need.then {
                Then::Nothing => {}
                Then::LinkToolchain => println!("then: rustup toolchain link bpf /usr"),
                Then::InstallLinker => println!("then: {}", linker_by_hand()),
            }
        }
        confirm(yes)?;
        apt(&packages, missing)?;
    }
    for need in missing {
        match need.then {
            Then::Nothing => {}
            Then::LinkToolchain => link_toolchain()?,
            Then::InstallLinker => install_linker()?,
        }
    }
    let still: Vec<_> = missing
        .iter()
        .filter(|need| !(need.detect)(need))
        .map(|need| need.what)
        .collect();
    ensure!(
        still.is_empty(),
        "installed, and still missing: {}",
        still.join(", ")
    );
    println!("setup is done\n");
    Ok(())
}

/// Those packages that dpkg does not have; all of them where there is no dpkg.
fn not_installed(wanted: BTreeSet<&'static str>) -> BTreeSet<&'static str> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(&wanted)
        .stderr(Stdio::null())
        .output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    wanted
        .into_iter()
        .filter(|package| {
            !text
                .lines()
                .any(|line| line == format!("{package} installed"))
        })
        .collect()
}

fn confirm(yes: bool) -> Result<()> {
    if yes || !stdin().is_terminal() || !stderr().is_terminal() {
        return Ok(());
    }
    eprint!("go on? [Y/n] ");
    let mut answer = String::new();
    stdin().read_line(&mut answer)?;
    let yes = ["", "y", "yes"].contains(&answer.trim().to_lowercase().as_str());
    ensure!(yes, "nothing was installed");
    Ok(())
}

/// Installing a server's package starts it, and enables it for the next boot; a developer's network
/// must see neither. A policy-rc.d that answers 101 forbids the first while we install.
const APT: &str = r#"
set -e
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=120 update
apt-get -o DPkg::Lock::Timeout=120 install --yes --no-install-recommends "$@"
for unit in isc-dhcp-server kea-dhcp4-server prometheus; do
    case " $* " in
    *" $unit "*) systemctl disable "$unit" 2>/dev/null || true ;;
    esac
done
"#;

fn apt(packages: &BTreeSet<&str>, missing: &[&Need]) -> Result<()> {
    if find("apt-get").is_none() {
        bail!("there is no apt here. {}", by_hand(packages, missing));
    }
    let mut command = match (Uid::effective().is_root(), find("sudo")) {
        (true, _) => Command::new("/bin/sh"),
        (false, Some(sudo)) => {
            let mut command = Command::new(sudo);
            command.args(["--", "/bin/sh"]);
            command
        }
        (false, None) => bail!(
            "installing needs root, and there is no sudo. {}",
            by_hand(packages, missing)
        ),
    };
    command.args(["-c", APT, "sh"]).args(packages);
    stream("apt", &mut command, |line| {
        let told = ["Need to get", "Setting up", "E:", "W:"];
        told.iter().any(|start| line.starts_with(start))
    })
    .with_context(|| by_hand(packages, missing))
}

fn by_hand(packages: &BTreeSet<&str>, missing: &[&Need]) -> String {
    let list = packages.iter().copied().collect::<Vec<_>>().join(" ");
    let mut text = format!("Install these (the names are Debian 12's): {list}");
    for need in missing {
        match need.then {
            Then::Nothing => {}
            Then::LinkToolchain => text.push_str(
                "\nthen `rustup toolchain link bpf /usr`; or, instead of rustc-web, cargo-web and \
                 libstd-rust-web-dev-bpf: \
                 `rustup toolchain install nightly --component rust-src`",
            ),
            Then::InstallLinker => {
                text.push_str(&format!("\nthen `{}`", linker_by_hand()));
            }
        }
    }
    text
}

fn link_toolchain() -> Result<()> {
    if bpf_toolchain() {
        return Ok(());
    }
    println!("  rustup: linking the toolchain `bpf` to Debian's rustc");
    let status = Command::new("rustup")
        .args(["toolchain", "link", "bpf", "/usr"])
        .status()
        .context("cannot run rustup, which this project needs")?;
    ensure!(status.success(), "rustup could not link the toolchain");
    Ok(())
}

fn install_linker() -> Result<()> {
    println!("  cargo: building bpf-linker {LINKER_VERSION} (a minute or two)");
    let path = env::var_os("PATH").unwrap_or_default();
    let llvm = [PathBuf::from(LLVM).join("bin")].into_iter();
    let path = env::join_paths(llvm.chain(env::split_paths(&path)))?;
    let mut command = Command::new("cargo");
    command
        .args(["install", "bpf-linker", "--version", LINKER_VERSION])
        .args(["--no-default-features", "--features", "llvm-22", "--force"])
        .env("LLVM_PREFIX", LLVM)
        .env("PATH", path)
        // Our own toolchain and target directory are no part of it.
        .current_dir(env::temp_dir())
        .env_remove("CARGO_TARGET_DIR");
    stream("cargo", &mut command, |line| {
        let told = [
            "Installing",
            "Compiling bpf-linker",
            "Compiling llvm-sys",
            "Installed",
            "error",
        ];
        told.iter()
            .any(|start| line.trim_start().starts_with(start))
    })
    .with_context(|| format!("cannot install bpf-linker; by hand: {}", linker_by_hand()))
}

fn linker_by_hand() -> String {
    format!(
        "LLVM_PREFIX={LLVM} PATH={LLVM}/bin:$PATH cargo install bpf-linker --version \
         {LINKER_VERSION} --no-default-features --features llvm-22"
    )
}

/// Runs a long command and shows those of its lines that matter; all of its end if it fails.
fn stream(name: &str, command: &mut Command, told: impl Fn(&str) -> bool) -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    // The command holds the pipe's other end too; without this we would never see its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut all = String::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if told(&line) {
            println!("  {name}: {}", line.trim());
            std::io::stdout().flush()?;
        }
        all.push_str(&line);
        all.push('\n');
    }
    let status = child.wait()?;
    ensure!(
        status.success(),
        "{name} failed ({status}):\n{}",
        tail(&all, 30)
    );
    Ok(())
}

/// A rustup toolchain called `bpf` whose library for BPF is there.
fn bpf_toolchain() -> bool {
    has_core(rustup_home().join("toolchains/bpf/lib/rustlib/bpfel-unknown-none/lib"))
}

fn has_core(dir: PathBuf) -> bool {
    let Ok(entries) = fs::read_dir(dir) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

/// aya-build's own way: it builds the standard library from its source.
fn nightly_with_source() -> bool {
    let Ok(entries) = fs::read_dir(rustup_home().join("toolchains")) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let source = entry
            .path()
            .join("lib/rustlib/src/rust/library/core/Cargo.toml");
        entry.file_name().to_string_lossy().starts_with("nightly") && source.exists()
    })
}

fn rustup_home() -> PathBuf {
    let default = || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".rustup");
    env::var_os("RUSTUP_HOME").map_or_else(default, PathBuf::from)
}

/// It is there and finds its LLVM.
fn linker_runs() -> bool {
    let default = || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo");
    let home = env::var_os("CARGO_HOME").map_or_else(default, PathBuf::from);
    let program = find("bpf-linker").unwrap_or_else(|| home.join("bin/bpf-linker"));
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
