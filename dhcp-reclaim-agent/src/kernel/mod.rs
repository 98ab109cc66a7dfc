//! The kernel half, as the loop sees it: ports, evidence, orders and records.

mod attach;
mod expedite;
mod filters;
mod load;
mod maps;
mod message;
mod ring;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use aya::{Ebpf, programs::ProgramError};
use dhcp_reclaim_ebpf::abi::{
    Counter, EmitOrder, PortSlot, ROLE_ASIDE, ROLE_UPLINK, ROLE_VM, WatchKey, WatchValue,
};

use nix::net::if_::if_indextoname;

pub use self::{
    attach::AttachedHook,
    expedite::Expedite,
    load::{Hook, LoadOptions, OBJECT, PINS},
    message::{Malformed, message, role_of, watch_ip, watch_mac},
    ring::{BATCH, RecordRing},
};
use self::{attach::Attachments, load::PinDir, maps::Maps};
use crate::{
    core::{IfIndex, Port, Role, Vlan},
    metrics::ProgramStats,
};

/// What keeps the kernel half from working, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("the agent lacks {missing}: run as root, or grant it the capability")]
    Privilege { missing: &'static str },
    #[error("{path} is not a BPF file system: `mount -t bpf bpf {path}` first")]
    NoBpffs { path: PathBuf },
    #[error("another agent{} is already here ({path})", .pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Occupied { path: PathBuf, pid: Option<u32> },
    #[error("{path}")]
    Path { path: PathBuf, source: io::Error },
    #[error("this kernel has no {feature}, which needs Linux {since} (and CONFIG_BPF_SYSCALL)")]
    Feature {
        feature: &'static str,
        since: &'static str,
        source: Box<aya::EbpfError>,
    },
    #[error("cannot load the kernel half")]
    Load(#[source] Box<aya::EbpfError>),
    #[error("the kernel refuses program {name}")]
    Program {
        name: &'static str,
        source: Box<ProgramError>,
    },
    #[error("the built-in object has no `{0}`: the build is broken")]
    Object(&'static str),
    #[error("map {name}")]
    Map {
        name: &'static str,
        source: Box<aya::maps::MapError>,
    },
    #[error("interface {ifindex} is gone")]
    PortGone { ifindex: IfIndex },
    #[error(
        "port {name} (index {ifindex}) shares its slot with interface {owner}, which is watched: \
         re-create one of them"
    )]
    SlotTaken {
        name: String,
        ifindex: IfIndex,
        owner: IfIndex,
    },
    #[error("cannot attach {program} to {name}: {hooks}")]
    Attach {
        program: &'static str,
        name: String,
        hooks: String,
    },
    #[error("map {0} is full: raise its size, or watch fewer bindings at once")]
    Full(&'static str),
    #[error("cannot read what a program has cost")]
    Info(#[source] Box<ProgramError>),
    #[error("cannot poll the ring buffer")]
    Poll(#[source] io::Error),
}

/// The loaded programs, their maps, and what they are attached to. Dropping it leaves everything as
/// it is, pinned and at work, for the next agent to take over: [`Kernel::unpin_all`] is the clean
/// stop.
pub struct Kernel {
    ebpf: Ebpf,
    hook: Hook,
    maps: Maps,
    attachments: Attachments,
    /// Last, so that the lock goes when all else is gone.
    pins: PinDir,
}

impl Kernel {
    /// Loads the programs, and takes over the maps that an earlier agent left.
    pub fn load(options: &LoadOptions) -> Result<Self, KernelError> {
        load::load(options)
    }

    /// Watches a port: its slot first, then the programs. Watching it again renews what the slot
    /// says, and puts back programs that others took away.
    ///
    /// `rate` and `burst` limit the port's records; a zero rate is no limit.
    pub fn watch(
        &mut self,
        port: &Port,
        rate: u16,
        burst: u16,
    ) -> Result<AttachedHook, KernelError> {
        let role = match port.role {
            Role::Vm => ROLE_VM,
            Role::Uplink => ROLE_UPLINK,
            Role::Aside => ROLE_ASIDE,
        };
        self.maps.ports.claim(port, role, rate, burst)?;
        self.attachments
            .attach(&mut self.ebpf, &self.pins, self.hook, port)
            .inspect_err(|_| self.maps.ports.release(port.ifindex))
    }

    /// Whether the port's programs are where they were put: others may take filters from a clsact.
    pub fn in_place(&self, ifindex: IfIndex) -> bool {
        self.attachments.in_place(ifindex)
    }

    /// The port is not of interest any more, or is gone.
    pub fn unwatch(&mut self, ifindex: IfIndex) {
        self.attachments.detach(ifindex);
        self.maps.ports.release(ifindex);
    }

    /// Detaches from every port that an earlier agent watched and this one does not: to be called
    /// once the first look at the ports is done. Returns those ports.
    pub fn forget_unwatched(&mut self) -> Result<Vec<IfIndex>, KernelError> {
        let mut stale = self.attachments.remove_stale(&self.pins)?;
        for slot in self.maps.ports.owners() {
            if !self.attachments.has(slot) {
                if attach::remove_filters(slot) {
                    stale.push(slot);
                }
                self.maps.ports.release(slot);
            }
        }
        stale.sort_unstable();
        stale.dedup();
        Ok(stale)
    }

    /// Puts the program `emit` behind the agent's private link.
    pub fn attach_emit(&mut self, ifindex: IfIndex) -> Result<AttachedHook, KernelError> {
        self.attachments
            .attach_emit(&mut self.ebpf, self.hook, ifindex)
    }

    /// While set, the port's frames are looked up in WATCH.
    pub fn set_exact(&mut self, ifindex: IfIndex, exact: bool) {
        self.maps.ports.set_exact(ifindex, exact);
    }

    /// How many records a second, and at once, the port may have; a zero rate is no limit.
    pub fn set_record_limits(&mut self, ifindex: IfIndex, rate: u16, burst: u16) {
        self.maps.ports.set_record_limits(ifindex, rate, burst);
    }

    /// The VLAN that the port's untagged frames belong to; zero: none, as on a bridge that does not
    /// filter VLANs.
    pub fn set_pvid(&mut self, ifindex: IfIndex, pvid: Vlan) {
        self.maps.ports.set_pvid(ifindex, pvid);
    }

    /// The epoch of the port's latest incoming frame; `None` if none came, or the port is not
    /// watched.
    pub fn port_epoch(&self, ifindex: IfIndex) -> Option<u32> {
        self.maps.ports.seen_epoch(ifindex)
    }

    /// How many records of this port were lost so far; wraps around.
    pub fn port_lost(&self, ifindex: IfIndex) -> Option<u32> {
        self.maps.ports.lost(ifindex)
    }

    /// The port's slot as it is now: for `doctor` and for tests.
    pub fn port_slot(&self, ifindex: IfIndex) -> Option<PortSlot> {
        self.maps.ports.get(ifindex)
    }

    /// Starts the next epoch and returns it: a port whose `port_epoch` reaches it has sent a frame
    /// after this call (or up to a frame's passing before, on another CPU). Never zero.
    pub fn advance_epoch(&mut self) -> Result<u32, KernelError> {
        self.maps.advance_epoch()
    }

    /// Starts watching an address, or goes on: what was seen of it stays, since only the kernel half
    /// ever writes an entry that is there.
    pub fn arm(&mut self, key: &WatchKey) -> Result<(), KernelError> {
        self.maps.arm(key)
    }

    /// Stops watching an address, and forgets what was seen.
    pub fn disarm(&mut self, key: &WatchKey) -> Result<(), KernelError> {
        self.maps.disarm(key)
    }

    /// What was seen of an address since it was armed; `None` if it is not.
    pub fn watched(&self, key: &WatchKey) -> Result<Option<WatchValue>, KernelError> {
        self.maps.watched(key)
    }

    /// Every address that is armed: an earlier agent's too.
    pub fn armed(&self) -> Result<Vec<WatchKey>, KernelError> {
        self.maps.armed()
    }

    /// Lets the RELEASE with this xid pass `emit`, once it is sent on the private link. It is there
    /// until it is forgotten, also for an agent that comes after this one.
    pub fn order(&mut self, xid: u32, order: &EmitOrder) -> Result<(), KernelError> {
        self.maps.order(xid, order)
    }

    /// What `emit` did with the order (`VERDICT_*`). `VERDICT_NONE`: the frame never came by.
    pub fn verdict(&self, xid: u32) -> Result<u8, KernelError> {
        self.maps.verdict(xid)
    }

    /// Every order that is there, by its xid: an earlier agent's too.
    pub fn orders(&self) -> Result<BTreeMap<u32, EmitOrder>, KernelError> {
        self.maps.orders()
    }

    /// Takes an order away: from here on a frame with this xid does not pass.
    pub fn forget_order(&mut self, xid: u32) -> Result<(), KernelError> {
        self.maps.forget_order(xid)
    }

    /// The slots of all ports that are watched: an earlier agent's too, whose ports may be gone.
    pub fn slots(&self) -> Vec<PortSlot> {
        let owners = self.maps.ports.owners().into_iter();
        owners.filter_map(|owner| self.port_slot(owner)).collect()
    }

    /// The kernel half's counters, by [`Counter::name`].
    pub fn counters(&self) -> Result<BTreeMap<&'static str, u64>, KernelError> {
        let values = Counter::ALL.into_iter().map(|counter| {
            let value = self.maps.counter(counter)?;
            Ok((counter.name(), value))
        });
        values.collect()
    }

    /// What each program has cost since it was loaded.
    pub fn programs(&self) -> Result<Vec<ProgramStats>, KernelError> {
        let mut programs = Vec::new();
        for (name, program) in self.ebpf.programs() {
            match program.info() {
                Ok(info) => programs.push(ProgramStats {
                    name: name.to_owned(),
                    runs: info.run_count(),
                    time: info.run_time(),
                }),
                // Those of the other hook.
                Err(ProgramError::NotLoaded) => {}
                Err(error) => return Err(KernelError::Info(Box::new(error))),
            }
        }
        Ok(programs)
    }

    /// The records, for the loop to wait for; to be taken once, within the runtime.
    pub fn ring(&mut self) -> Result<RecordRing, KernelError> {
        RecordRing::take(&mut self.ebpf)
    }

    /// The log of the programs, if [`LoadOptions::debug`] asked for one; to be taken once.
    pub fn logger(&mut self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf).ok()
    }

    /// The object itself, for test runs of its programs.
    pub fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    /// Takes away what agents left that are not running any more; returns the ports of that.
    pub fn detach_left(bpffs: &Path) -> Result<Vec<IfIndex>, KernelError> {
        if !bpffs.join(PINS).exists() {
            return Ok(Vec::new());
        }
        let mut kernel = Self::load(&LoadOptions {
            bpffs: bpffs.to_owned(),
            ..LoadOptions::default()
        })?;
        let ports = kernel.forget_unwatched()?;
        kernel.unpin_all()?;
        Ok(ports)
    }

    /// The clean stop: detaches everything and removes the pins.
    pub fn unpin_all(mut self) -> Result<(), KernelError> {
        self.attachments.detach_all();
        self.pins.remove()
    }
}

/// The interface's name as it is now. nix takes libc's null pointer for a name without letters.
fn interface_name(ifindex: IfIndex) -> Option<String> {
    let name = if_indextoname(ifindex).ok()?.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}
