//! The maps, typed; the slots are mapped into memory.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
};
use dhcp_reclaim_ebpf::abi::{
    Counter, EmitOrder, PORT_SLOTS, PortSlot, VERDICT_NONE, WatchKey, WatchValue, port_slots,
};
use zerocopy::{FromZeros as _, transmute};

use super::{KernelError, interface_name};
use crate::core::{IfIndex, Port};

/// `BPF_NOEXIST`
const NO_EXIST: u64 = 1;

pub(super) struct Maps {
    pub(super) ports: Ports,
    watch: HashMap<MapData, [u8; size_of::<WatchKey>()], [u8; size_of::<WatchValue>()]>,
    orders: HashMap<MapData, [u8; 4], [u8; size_of::<EmitOrder>()]>,
    counters: PerCpuArray<MapData, u64>,
    epoch: Array<MapData, u32>,
    current_epoch: u32,
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf, current_epoch: u32) -> Result<Self, KernelError> {
        let Map::Array(ports) = take(ebpf, "PORTS")? else {
            return Err(KernelError::Object("PORTS"));
        };
        Ok(Self {
            ports: Ports::map(&ports).map_err(|error| map_error("PORTS", error.into()))?,
            watch: typed(ebpf, "WATCH")?,
            orders: typed(ebpf, "ORDERS")?,
            counters: typed(ebpf, "COUNTERS")?,
            epoch: typed(ebpf, ".data")?,
            current_epoch,
        })
    }

    /// The epoch that an earlier agent came to.
    pub(super) fn pinned_epoch(path: &Path) -> Option<u32> {
        let map = Map::Array(MapData::from_pin(path).ok()?);
        Array::<_, u32>::try_from(map).ok()?.get(&0, 0).ok()
    }

    pub(super) fn advance_epoch(&mut self) -> Result<u32, KernelError> {
        // Zero is a slot's word for never.
        let next = self.current_epoch.checked_add(1).unwrap_or(1);
        self.epoch
            .set(0, next, 0)
            .map_err(|error| map_error(".data", error))?;
        self.current_epoch = next;
        Ok(next)
    }

    pub(super) fn arm(&mut self, key: &WatchKey) -> Result<(), KernelError> {
        let nothing = [0; size_of::<WatchValue>()];
        let key: [u8; size_of::<WatchKey>()] = transmute!(*key);
        match self.watch.insert(key, nothing, NO_EXIST) {
            Err(error) if os_error(&error) == Some(libc::EEXIST) => Ok(()),
            result => result.map_err(|error| full_or("WATCH", error)),
        }
    }

    pub(super) fn disarm(&mut self, key: &WatchKey) -> Result<(), KernelError> {
        match self.watch.remove(&transmute!(*key)) {
            Err(error) if is_missing(&error) => Ok(()),
            result => result.map_err(|error| map_error("WATCH", error)),
        }
    }

    pub(super) fn watched(&self, key: &WatchKey) -> Result<Option<WatchValue>, KernelError> {
        match self.watch.get(&transmute!(*key), 0) {
            Ok(value) => Ok(Some(transmute!(value))),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(map_error("WATCH", error)),
        }
    }

    pub(super) fn armed(&self) -> Result<Vec<WatchKey>, KernelError> {
        let keys = self.watch.keys().map(|key| key.map(|key| transmute!(key)));
        keys.collect::<Result<_, _>>()
            .map_err(|error| map_error("WATCH", error))
    }

    pub(super) fn order(&mut self, xid: u32, order: &EmitOrder) -> Result<(), KernelError> {
        let order: [u8; size_of::<EmitOrder>()] = transmute!(*order);
        self.orders
            .insert(xid.to_be_bytes(), order, 0)
            .map_err(|error| full_or("ORDERS", error))
    }

    pub(super) fn verdict(&self, xid: u32) -> Result<u8, KernelError> {
        match self.orders.get(&xid.to_be_bytes(), 0) {
            Ok(order) => {
                let order: EmitOrder = transmute!(order);
                Ok(order.verdict)
            }
            Err(error) if is_missing(&error) => Ok(VERDICT_NONE),
            Err(error) => Err(map_error("ORDERS", error)),
        }
    }

    pub(super) fn orders(&self) -> Result<BTreeMap<u32, EmitOrder>, KernelError> {
        let rows = self.orders.iter().map(|row| {
            let (xid, order) = row?;
            Ok((u32::from_be_bytes(xid), transmute!(order)))
        });
        rows.collect::<Result<_, _>>()
            .map_err(|error| map_error("ORDERS", error))
    }

    pub(super) fn forget_order(&mut self, xid: u32) -> Result<(), KernelError> {
        match self.orders.remove(&xid.to_be_bytes()) {
            Err(error) if is_missing(&error) => Ok(()),
            result => result.map_err(|error| map_error("ORDERS", error)),
        }
    }

    pub(super) fn counter(&self, counter: Counter) -> Result<u64, KernelError> {
        let values = self
            .counters
            .get(&(counter as u32), 0)
            .map_err(|error| map_error("COUNTERS", error))?;
        Ok(values.iter().sum())
    }
}

/// The slots, in memory that the programs see. Each field that the agent owns is stored for itself,
/// so nothing that the kernel half wrote in the meantime is undone.
pub(super) struct Ports {
    slots: NonNull<PortSlot>,
}

// SAFETY: the mapping belongs to the process, not to a thread; all accesses are atomic.
unsafe impl Send for Ports {}

impl Ports {
    const BYTES: usize = PORT_SLOTS as usize * size_of::<PortSlot>();

    fn map(map: &MapData) -> io::Result<Self> {
        // SAFETY: a fresh mapping of a map of this size, at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let slots = NonNull::new(address.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { slots })
    }

    /// Makes the slot the port's. What the kernel half knows stays if it was the port's already.
    pub(super) fn claim(
        &mut self,
        port: &Port,
        role: u8,
        rate: u16,
        burst: u16,
    ) -> Result<(), KernelError> {
        let slot = match self.owned(port.ifindex) {
            Some(slot) => slot,
            None => {
                let slot = self.free(port)?;
                slot.clear();
                slot
            }
        };
        slot.segment().store(port.segment, Ordering::Relaxed);
        slot.rate().store(rate, Ordering::Relaxed);
        slot.burst().store(burst, Ordering::Relaxed);
        slot.role().store(role, Ordering::Relaxed);
        // Last: it is what makes the programs look at the rest.
        slot.ifindex().store(port.ifindex, Ordering::Release);
        Ok(())
    }

    /// Frees the slot, if it is the port's.
    pub(super) fn release(&mut self, ifindex: IfIndex) {
        if let Some(slot) = self.owned(ifindex) {
            slot.ifindex().store(0, Ordering::Release);
        }
    }

    pub(super) fn set_exact(&mut self, ifindex: IfIndex, exact: bool) {
        if let Some(slot) = self.owned(ifindex) {
            slot.exact().store(u8::from(exact), Ordering::Release);
        }
    }

    pub(super) fn set_record_limits(&mut self, ifindex: IfIndex, rate: u16, burst: u16) {
        if let Some(slot) = self.owned(ifindex) {
            slot.rate().store(rate, Ordering::Relaxed);
            slot.burst().store(burst, Ordering::Relaxed);
        }
    }

    pub(super) fn set_pvid(&mut self, ifindex: IfIndex, pvid: u16) {
        if let Some(slot) = self.owned(ifindex) {
            slot.pvid().store(pvid, Ordering::Release);
        }
    }

    pub(super) fn seen_epoch(&self, ifindex: IfIndex) -> Option<u32> {
        let epoch = self.owned(ifindex)?.seen_epoch().load(Ordering::Acquire);
        (epoch != 0).then_some(epoch)
    }

    pub(super) fn lost(&self, ifindex: IfIndex) -> Option<u32> {
        Some(self.owned(ifindex)?.lost().load(Ordering::Acquire))
    }

    pub(super) fn get(&self, ifindex: IfIndex) -> Option<PortSlot> {
        Some(self.owned(ifindex)?.copy())
    }

    pub(super) fn owners(&self) -> Vec<IfIndex> {
        let owners = (0..PORT_SLOTS).map(|at| self.slot(at).ifindex().load(Ordering::Relaxed));
        owners.filter(|&owner| owner != 0).collect()
    }

    /// One of the port's places that is nobody's.
    fn free(&self, port: &Port) -> Result<Slot, KernelError> {
        let mut taken = None;
        for slot in port_slots(port.ifindex).map(|at| self.slot(at)) {
            let owner = slot.ifindex().load(Ordering::Acquire);
            if owner == 0 || interface_name(owner).is_none() {
                return Ok(slot);
            }
            taken = taken.or(Some(owner));
        }
        Err(KernelError::SlotTaken {
            name: port.name.clone(),
            ifindex: port.ifindex,
            owner: taken.unwrap_or_default(),
        })
    }

    fn owned(&self, ifindex: IfIndex) -> Option<Slot> {
        let mut slots = port_slots(ifindex).into_iter().map(|at| self.slot(at));
        slots.find(|slot| ifindex != 0 && slot.ifindex().load(Ordering::Acquire) == ifindex)
    }

    fn slot(&self, at: u32) -> Slot {
        let at = (at & (PORT_SLOTS - 1)) as usize;
        // SAFETY: masked into the mapping.
        Slot(unsafe { self.slots.add(at) })
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; no `Slot` outlives a method.
        unsafe { libc::munmap(self.slots.as_ptr().cast(), Self::BYTES) };
    }
}

/// One slot, field by field.
struct Slot(NonNull<PortSlot>);

macro_rules! fields {
    ($($field:ident: $atomic:ty),* $(,)?) => {
        impl Slot {
            $(fn $field(&self) -> &$atomic {
                // SAFETY: an aligned field of a live mapping that is only accessed atomically; the
                // kernel half's stores to it are whole words too.
                unsafe { <$atomic>::from_ptr(&raw mut (*self.0.as_ptr()).$field) }
            })*
        }
    };
}

fields! {
    ifindex: AtomicU32,
    segment: AtomicU32,
    seen_epoch: AtomicU32,
    lost: AtomicU32,
    rate: AtomicU16,
    burst: AtomicU16,
    role: AtomicU8,
    exact: AtomicU8,
    pvid: AtomicU16,
}

impl Slot {
    /// Of a slot that no program looks at.
    fn clear(&self) {
        self.ifindex().store(0, Ordering::SeqCst);
        // SAFETY: within the mapping; its owner is gone, so nobody writes to it.
        unsafe { ptr::write_volatile(self.0.as_ptr(), PortSlot::new_zeroed()) };
    }

    fn copy(&self) -> PortSlot {
        // SAFETY: within the mapping, and every pattern of bits is a slot. Fields may be of
        // different moments.
        unsafe { ptr::read_volatile(self.0.as_ptr()) }
    }
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    ebpf.take_map(name).ok_or(KernelError::Object(name))
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, KernelError> {
    take(ebpf, name)?
        .try_into()
        .map_err(|error| map_error(name, error))
}

fn map_error(name: &'static str, error: MapError) -> KernelError {
    KernelError::Map {
        name,
        source: Box::new(error),
    }
}

fn full_or(name: &'static str, error: MapError) -> KernelError {
    if os_error(&error) == Some(libc::E2BIG) {
        return KernelError::Full(name);
    }
    map_error(name, error)
}

fn is_missing(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound) || os_error(error) == Some(libc::ENOENT)
}

fn os_error(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        MapError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}
