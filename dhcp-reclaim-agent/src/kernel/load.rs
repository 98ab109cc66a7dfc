//! Loading: what the agent may do, where it may pin, and the object with its maps.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    EbpfError, EbpfLoader,
    maps::{MapError, MapInfo, MapType},
    programs::{SchedClassifier, Xdp},
};
use dhcp_reclaim_ebpf::abi::{
    ABI_VERSION, Counter, EmitOrder, ORDER_ENTRIES, PORT_SLOTS, PortSlot, RING_BYTES,
    WATCH_ENTRIES, WatchKey, WatchValue,
};
use nix::sys::{
    resource::{RLIM_INFINITY, Resource, setrlimit},
    statfs::{BPF_FS_MAGIC, statfs},
};

use super::{Kernel, KernelError, attach::Attachments, maps::Maps};

/// The kernel half as it was built: an ELF file.
pub static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dhcp-reclaim-bpf"));

/// Where the kernel half listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// tcx, or clsact where the kernel has none.
    #[default]
    Tc,
    /// clsact even where tcx is there.
    Clsact,
    /// XDP, native or else generic: hears only what comes in.
    Xdp,
}

#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the BPF file system is mounted.
    pub bpffs: PathBuf,
    pub hook: Hook,
    /// Size of the record ring: a power of two, a page at least.
    pub ring_bytes: u32,
    /// Keep the `debug!` lines in the programs; the verifier drops them else.
    pub debug: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            bpffs: PathBuf::from("/sys/fs/bpf"),
            hook: Hook::default(),
            ring_bytes: RING_BYTES,
            debug: false,
        }
    }
}

/// The folder of all pins.
pub const PINS: &str = "dhcp-reclaim";

/// `<bpffs>/dhcp-reclaim/v<ABI_VERSION>`, held by a lock on the folder above.
pub(super) struct PinDir {
    top: PathBuf,
    dir: PathBuf,
    /// bpffs has no regular files, but a folder can be locked.
    _lock: File,
}

impl PinDir {
    pub(super) fn links(&self) -> PathBuf {
        self.dir.join("links")
    }

    /// Removes the pins; what nobody else holds goes with them.
    pub(super) fn remove(self) -> Result<(), KernelError> {
        fs::remove_dir_all(&self.top).map_err(|source| path_error(&self.top, source))
    }

    fn open(bpffs: &Path) -> Result<Self, KernelError> {
        let is_bpffs = statfs(bpffs).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
        if !is_bpffs {
            return Err(KernelError::NoBpffs {
                path: bpffs.to_owned(),
            });
        }
        let top = bpffs.join(PINS);
        let lock = Self::lock(&top)?;
        let version = format!("v{ABI_VERSION}");
        let pins = Self {
            dir: top.join(&version),
            top,
            _lock: lock,
        };
        let entries = fs::read_dir(&pins.top).map_err(|source| path_error(&pins.top, source))?;
        for entry in entries.flatten() {
            // Programs of another layout write to maps that nobody reads any more.
            if entry.file_name() != *version {
                fs::remove_dir_all(entry.path())
                    .map_err(|source| path_error(&entry.path(), source))?;
            }
        }
        let links = pins.links();
        fs::create_dir_all(&links).map_err(|source| path_error(&links, source))?;
        Ok(pins)
    }

    fn lock(top: &Path) -> Result<File, KernelError> {
        let mut tries = 0;
        loop {
            tries += 1;
            fs::create_dir_all(top).map_err(|source| path_error(top, source))?;
            let file = File::open(top).map_err(|source| path_error(top, source))?;
            let inode = |meta: fs::Metadata| (meta.dev(), meta.ino());
            let locked = file
                .metadata()
                .map(inode)
                .map_err(|source| path_error(top, source))?;
            match file.try_lock() {
                // The agent before us may have removed the folder after we opened it.
                Ok(()) if fs::metadata(top).map(inode).ok() == Some(locked) => return Ok(file),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let pid = lock_holder(locked.1);
                    // It has been let go since; or is held where we cannot see it.
                    if pid.is_none() && tries < LOCK_TRIES {
                        continue;
                    }
                    return Err(KernelError::Occupied {
                        path: top.to_owned(),
                        pid,
                    });
                }
                Err(TryLockError::Error(source)) => return Err(path_error(top, source)),
            }
        }
    }
}

pub(super) fn path_error(path: &Path, source: io::Error) -> KernelError {
    KernelError::Path {
        path: path.to_owned(),
        source,
    }
}

/// So often a lock that nobody seems to hold is tried: a child may have had a copy for a moment.
const LOCK_TRIES: u32 = 16;

/// `1: FLOCK  ADVISORY  WRITE 708 08:01:4711 0 EOF`
fn lock_holder(inode: u64) -> Option<u32> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        if fields.next() != Some("FLOCK") {
            return None;
        }
        let pid = fields.nth(2)?.parse().ok()?;
        let (_, found) = fields.next()?.rsplit_once(':')?;
        (found.parse() == Ok(inode)).then_some(pid)
    })
}

pub(super) fn load(options: &LoadOptions) -> Result<Kernel, KernelError> {
    check_privilege()?;
    let pins = PinDir::open(&options.bpffs)?;
    // Before Linux 5.11 maps count as locked memory. If this is refused, so are they, and that says
    // what is wrong.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);

    let specs = specs(options.ring_bytes);
    let paths = specs.each_ref().map(|spec| pins.dir.join(spec.pin));
    for (spec, path) in specs.iter().zip(&paths) {
        if path.exists() && !spec.fits(path) {
            fs::remove_file(path).map_err(|source| path_error(path, source))?;
        }
    }
    // Loading writes the initial value of a global to its map, pinned or not: go on where the agent
    // before us stopped, or the epochs in the slots would lie in the future.
    let epoch = Maps::pinned_epoch(&pins.dir.join(EPOCH_PIN)).unwrap_or(1);
    let log_level: u8 = if options.debug {
        aya_log::Level::Debug as u8
    } else {
        0
    };

    let mut loader = EbpfLoader::new();
    loader
        .override_global("EPOCH", &epoch, true)
        .override_global(aya_log::LEVEL, &log_level, false)
        .map_max_entries("RECORDS", options.ring_bytes);
    for (spec, path) in specs.iter().zip(&paths) {
        loader.map_pin_path(spec.name, path.as_path());
    }
    let mut ebpf = loader.load(OBJECT).map_err(explain)?;

    let programs: &[_] = match options.hook {
        Hook::Tc | Hook::Clsact => &["vm_ingress", "vm_egress", "emit", "baseline"],
        Hook::Xdp => &["emit"],
    };
    for &name in programs {
        program::<SchedClassifier>(&mut ebpf, name)?
            .load()
            .map_err(|source| KernelError::Program {
                name,
                source: Box::new(source),
            })?;
    }
    if options.hook == Hook::Xdp {
        let name = "xdp_ingress";
        program::<Xdp>(&mut ebpf, name)?
            .load()
            .map_err(|source| KernelError::Program {
                name,
                source: Box::new(source),
            })?;
    }
    let maps = Maps::take(&mut ebpf, epoch)?;
    Ok(Kernel {
        ebpf,
        hook: options.hook,
        maps,
        attachments: Attachments::default(),
        pins,
    })
}

/// The program of this name and type.
pub(super) fn program<'a, P>(
    ebpf: &'a mut aya::Ebpf,
    name: &'static str,
) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program>,
{
    let program = ebpf.program_mut(name).ok_or(KernelError::Object(name))?;
    program.try_into().map_err(|_| KernelError::Object(name))
}

const EPOCH_PIN: &str = "EPOCH";

/// What a pinned map must be like to go on with it.
struct Spec {
    name: &'static str,
    /// bpffs keeps names with dots to itself.
    pin: &'static str,
    kind: MapType,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

impl Spec {
    fn fits(&self, path: &Path) -> bool {
        MapInfo::from_pin(path).is_ok_and(|info| {
            info.map_type().is_ok_and(|kind| kind == self.kind)
                && (info.key_size(), info.value_size(), info.max_entries())
                    == (self.key_size, self.value_size, self.entries)
        })
    }
}

fn specs(ring_bytes: u32) -> [Spec; 6] {
    let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let spec = |name, kind, key, value, entries| Spec {
        name,
        pin: name,
        kind,
        key_size: size(key),
        value_size: size(value),
        entries,
    };
    let counters = size(Counter::ALL.len());
    [
        spec(
            "PORTS",
            MapType::Array,
            4,
            size_of::<PortSlot>(),
            PORT_SLOTS,
        ),
        spec(
            "WATCH",
            MapType::Hash,
            size_of::<WatchKey>(),
            size_of::<WatchValue>(),
            WATCH_ENTRIES,
        ),
        spec(
            "ORDERS",
            MapType::Hash,
            4,
            size_of::<EmitOrder>(),
            ORDER_ENTRIES,
        ),
        spec("RECORDS", MapType::RingBuf, 0, 0, ring_bytes),
        spec("COUNTERS", MapType::PerCpuArray, 4, 8, counters),
        Spec {
            pin: EPOCH_PIN,
            ..spec(".data", MapType::Array, 4, 4, 1)
        },
    ]
}

fn check_privilege() -> Result<(), KernelError> {
    const SYS_ADMIN: u32 = 21;
    const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
    let path = Path::new("/proc/thread-self/status");
    let status = fs::read_to_string(path).map_err(|source| path_error(path, source))?;
    let caps = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let has = |cap: u32| caps & (1 << cap) != 0;
    // The two that CAP_SYS_ADMIN was split into in Linux 5.8.
    let implied = |cap: u32| cap > SYS_ADMIN && has(SYS_ADMIN);
    let missing = NEEDED.iter().find(|(cap, _)| !(has(*cap) || implied(*cap)));
    match missing {
        Some((_, missing)) => Err(KernelError::Privilege { missing }),
        None => Ok(()),
    }
}

/// Features are found out by trying: distributions carry them back to older versions.
fn explain(error: EbpfError) -> KernelError {
    let feature = match &error {
        EbpfError::MapError(MapError::CreateError { name, io_error })
            if io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            match name.as_str() {
                "RECORDS" | "AYA_LOGS" => Some(("BPF ring buffer", "5.8")),
                "PORTS" => Some(("BPF arrays that can be mapped into memory", "5.5")),
                _ => None,
            }
        }
        _ => None,
    };
    let source = Box::new(error);
    match feature {
        Some((feature, since)) => KernelError::Feature {
            feature,
            since,
            source,
        },
        None => KernelError::Load(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_flock_is_named() {
        let dir = tempdir();
        let file = File::open(&dir).unwrap();
        file.try_lock().unwrap();
        let inode = file.metadata().unwrap().ino();
        assert_eq!(lock_holder(inode), Some(std::process::id()));
        drop(file);
        assert_eq!(lock_holder(inode), None);
        fs::remove_dir(dir).unwrap();
    }

    #[test]
    fn a_folder_elsewhere_is_not_bpffs() {
        let Err(error) = PinDir::open(Path::new("/proc")) else {
            panic!("/proc was taken")
        };
        assert_eq!(
            error.to_string(),
            "/proc is not a BPF file system: `mount -t bpf bpf /proc` first"
        );
    }

    fn tempdir() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("drk-lock-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}
