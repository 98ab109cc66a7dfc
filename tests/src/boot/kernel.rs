//! Kernels to boot, fetched as packages from the mirror that this machine's apt uses, and unpacked
//! without being installed.
use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use crate::sandbox::run;

/// A kernel by what it is there for: each is its suite's `linux-image-cloud-amd64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelVersion {
    /// Debian 11: the oldest with all that is needed; clsact.
    V5_10,
    /// Debian 12: clsact.
    V6_1,
    /// Debian 13: tcx.
    V6_12,
    /// What Debian's testing has today.
    Newest,
}

impl KernelVersion {
    pub const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    pub const fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        }
    }

    const fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Newest => "testing",
        }
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KernelVersion {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|this| this.name() == text);
        found.with_context(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("no kernel {text:?}; there are {names}")
        })
    }
}

/// A kernel that is there, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What a boot loader loads.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The kernel in `store`, fetched into it if it is not there yet, or if `again`.
    pub fn fetch(version: KernelVersion, store: &Path, again: bool) -> Result<Self> {
        let dir = store.join(version.name());
        if !again && let Ok(kernel) = Self::open(&dir) {
            return Ok(kernel);
        }
        let fresh = store.join(format!("{version}.new"));
        remove(&fresh)?;
        download(version, &fresh)
            .and_then(|()| Self::open(&fresh).map(drop))
            .with_context(|| format!("cannot fetch the kernel {version}"))?;
        remove(&dir)?;
        fs::rename(&fresh, &dir)?;
        Self::open(&dir)
    }

    /// The kernel that is in `store`, without asking anybody.
    pub fn find(version: KernelVersion, store: &Path) -> Result<Self> {
        Self::open(&store.join(version.name()))
            .with_context(|| format!("`cargo xtask vm --kernel {version} --fetch` fetches it"))
    }

    /// Where `cargo xtask vm` keeps kernels.
    pub fn store() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .with_file_name("target")
            .join("vm/kernels")
    }

    /// Debian has moved the image from `/boot` into the modules' folder, and that into `/usr`.
    fn open(dir: &Path) -> Result<Self> {
        for parent in ["lib/modules", "usr/lib/modules"] {
            let Ok(mut entries) = fs::read_dir(dir.join(parent)) else {
                continue;
            };
            let modules = entries
                .next()
                .with_context(|| format!("nothing in {}/{parent}", dir.display()))??
                .path();
            let release = modules
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let images = [
                dir.join(format!("boot/vmlinuz-{release}")),
                modules.join("vmlinuz"),
            ];
            let image = images.into_iter().find(|image| image.exists());
            return Ok(Self {
                image: image.with_context(|| format!("no image of {release}"))?,
                release,
                modules,
            });
        }
        bail!("no kernel in {}", dir.display())
    }

    /// The module of this name, ready to be loaded, and the names of those that it needs; `None` if
    /// it is built in.
    pub(super) fn module(&self, name: &str) -> Result<Option<Module>> {
        let wanted = name.replace('-', "_");
        let Some(path) = find_module(&self.modules.join("kernel"), &wanted)? else {
            let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
            let is_in = builtin.lines().any(|line| module_name(line) == wanted);
            ensure!(is_in, "{} has no module {name}", self.release);
            return Ok(None);
        };
        let object = match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => fs::read(&path)?,
            Some("xz") => decompress("xz", &path)?,
            Some("zst") => decompress("zstd", &path)?,
            _ => bail!("cannot read {}", path.display()),
        };
        let needs = needs(&object).with_context(|| format!("{} is no module", path.display()))?;
        Ok(Some(Module { object, needs }))
    }
}

/// The version of the kernel that runs here, as far as features go by it.
pub fn running() -> Result<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    version(&release).with_context(|| format!("cannot read the kernel's version {release:?}"))
}

/// Before Linux 5.11 programs and maps count as their user's locked memory, all processes' together.
pub fn unlimit_locked_memory() -> Result<()> {
    if running()? < (5, 11) {
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
    }
    Ok(())
}

/// Debian's have tcx as soon as Linux has it; others are watched by clsact.
pub fn has_tcx() -> Result<bool> {
    Ok(running()? >= (6, 6))
}

/// Of a kernel's release, as in `6.12.90-amd64`.
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) struct Module {
    pub object: Vec<u8>,
    pub needs: Vec<String>,
}

/// Fetches the suite's cloud kernel and unpacks it into `dir`. Neither the machine's own package
/// lists nor its installed packages are touched.
fn download(version: KernelVersion, dir: &Path) -> Result<()> {
    const META: &str = "linux-image-cloud-amd64";
    let suite = version.suite();
    let apt = dir.join("apt");
    for folder in ["lists/partial", "cache/archives/partial", "packages"] {
        fs::create_dir_all(apt.join(folder))?;
    }
    let list = apt.join("sources.list");
    let mirror = mirror()?;
    fs::write(
        &list,
        format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n"),
    )?;
    let options = [
        format!("Dir::Etc::SourceList={}", list.display()),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        format!("Dir::State={}", apt.display()),
        "Dir::State::status=/dev/null".to_owned(),
        format!("Dir::Cache={}", apt.join("cache").display()),
        "APT::Architecture=amd64".to_owned(),
        "APT::Sandbox::User=".to_owned(),
        "Acquire::Languages=none".to_owned(),
        "Acquire::Retries=5".to_owned(),
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
    ];
    let apt_command = |program: &str| {
        let mut command = Command::new(program);
        command.args(options.iter().flat_map(|option| ["-o", option]));
        command.current_dir(apt.join("packages"));
        command
    };
    run(apt_command("apt-get").arg("update"))?;

    // Newer packages are made of several: follow those that are of this very kernel.
    let mut packages = BTreeSet::new();
    let mut open = vec![META.to_owned()];
    while let Some(package) = open.pop() {
        let told = run(apt_command("apt-cache").args(["depends", "--important", &package]))?;
        for line in told.lines() {
            let Some(needed) = line.trim().strip_prefix("Depends: ") else {
                continue;
            };
            let part = ["linux-image-", "linux-binary-", "linux-modules-"]
                .iter()
                .find_map(|prefix| needed.strip_prefix(prefix));
            let versioned = part.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
            if versioned && packages.insert(needed.to_owned()) {
                open.push(needed.to_owned());
            }
        }
    }
    ensure!(!packages.is_empty(), "{META} of {suite} names no kernel");
    run(apt_command("apt-get").arg("download").args(&packages))?;
    for entry in fs::read_dir(apt.join("packages"))? {
        run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(dir))?;
    }
    remove(&apt)
}

/// It has the keys of all of Debian's suites.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where this machine gets Debian from.
pub fn mirror() -> Result<String> {
    let targets = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(COMPONENT)",
        "Created-By: Packages",
        "Origin: Debian",
        "Label: Debian",
    ]))?;
    let of_main = targets.lines().find_map(|line| line.strip_suffix(" main"));
    of_main.map(str::to_owned).context(
        "this machine's apt knows no Debian mirror (`apt-get indextargets` names none): kernels \
         come from there",
    )
}

fn find_module(dir: &Path, wanted: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Some(found) = find_module(&path, wanted)? {
                return Ok(Some(found));
            }
        } else if module_name(&path.to_string_lossy()) == wanted {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// `sch_netem` of `kernel/net/sched/sch_netem.ko.xz`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let name = file.split_once(".ko").map_or("", |(name, _)| name);
    name.replace('-', "_")
}

/// The `.modinfo` section is a row of strings that end with NUL, one of which is `depends=a,b`.
fn needs(object: &[u8]) -> Result<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let at = object
        .windows(KEY.len())
        .position(|window| window == KEY)
        .context("no list of what it depends on")?;
    let list = object[at + KEY.len()..].split(|byte| *byte == 0).next();
    let list = String::from_utf8_lossy(list.unwrap_or_default()).into_owned();
    Ok(list
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

fn decompress(program: &str, path: &Path) -> Result<Vec<u8>> {
    let output = Command::new(program)
        .args(["-dc"])
        .arg(path)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} cannot read {}: {}",
        path.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_known_by_their_files() {
        assert_eq!(module_name("kernel/net/8021q/8021q.ko.xz"), "8021q");
        assert_eq!(module_name("kernel/drivers/md/dm-verity.ko"), "dm_verity");
        assert_eq!(module_name("kernel/net/Makefile"), "");
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version("6.1.0-50-cloud-amd64\n"), Some((6, 1)));
        assert_eq!(version("6.12.117+deb13-cloud-amd64"), Some((6, 12)));
        assert_eq!(version("7.2-rc1"), Some((7, 2)));
        assert_eq!(version("x"), None);
    }

    #[test]
    fn a_module_says_what_it_needs() {
        let object = b"\x7fELF...license=GPL\0depends=mrp,garp\0retpoline=Y\0";
        assert_eq!(needs(object).unwrap(), ["mrp", "garp"]);
        assert!(needs(b"x\0depends=\0y").unwrap().is_empty());
        assert!(needs(b"\x7fELF").is_err());
    }
}
