//! The kernel half, as the loop sees it: ports, evidence, orders and records.

mod attach;
mod load;
mod maps;
mod message;
mod ring;

use std::{collections::BTreeMap, io, path::PathBuf};

use aya::{Ebpf, programs::ProgramError};
use dhcp_reclaim_ebpf::abi::{
    Counter, EmitOrder, PortSlot, ROLE_UPLINK, ROLE_VM, WatchKey, WatchValue,
};

use nix::net::if_::if_indextoname;

pub use self::{
    attach::AttachedHook,
    load::{Hook, LoadOptions},
    message::{Malformed, message, watch_ip, watch_mac},
    ring::{BATCH, RecordRing},
};
use self::{attach::Attachments, load::PinDir, maps::Maps};
use crate::core::{IfIndex, Port, Role};

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
        };
        self.maps.ports.claim(port, role, rate, burst)?;
        self.attachments
            .attach(&mut self.ebpf, &self.pins, self.hook, port)
            .inspect_err(|_| self.maps.ports.release(port.ifindex))
    }

    /// The port is not of interest any more, or is gone.
    pub fn unwatch(&mut self, ifindex: IfIndex) {
        self.attachments.detach(ifindex);
        self.maps.ports.release(ifindex);
    }

    /// Detaches from every port that an earlier agent watched and this one does not: to be called
    /// once the first look at the ports is done. Returns those ports.
    pub fn forget_unwatched(&mut self) -> Result<Vec<IfIndex>, KernelError> {
        let stale = self.attachments.remove_stale(&self.pins)?;
        for slot in self.maps.ports.owners() {
            if !self.attachments.has(slot) {
                self.maps.ports.release(slot);
            }
        }
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

    /// Lets the RELEASE with this xid pass `emit`, once it is sent on the private link.
    pub fn order(&mut self, xid: u32, order: &EmitOrder) -> Result<(), KernelError> {
        self.maps.order(xid, order)
    }

    /// What `emit` did with the order (`VERDICT_*`), which it takes away. `VERDICT_NONE`: the frame
    /// never came by.
    pub fn verdict(&mut self, xid: u32) -> Result<u8, KernelError> {
        self.maps.verdict(xid)
    }

    /// Takes away the orders that an earlier agent left.
    pub fn clear_orders(&mut self) -> Result<(), KernelError> {
        self.maps.clear_orders()
    }

    /// The kernel half's counters, by [`Counter::name`].
    pub fn counters(&self) -> Result<BTreeMap<&'static str, u64>, KernelError> {
        let values = Counter::ALL.into_iter().map(|counter| {
            let value = self.maps.counter(counter)?;
            Ok((counter.name(), value))
        });
        values.collect()
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
