//! The programs and their maps: one `match` from what a frame is to what becomes of it.
//!
//! Guests' frames are only looked at: each observer returns the verdict that hands the frame on.
#![no_std]
#![no_main]

use core::{cell::UnsafeCell, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md},
    helpers::{bpf_ktime_get_ns, bpf_redirect, bpf_skb_load_bytes, bpf_skb_vlan_push},
    macros::{classifier, map, xdp},
    maps::{Array, HashMap, PerCpuArray, RingBuf},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use dhcp_reclaim_ebpf::{
    abi::{
        Counter, DIRECTION_FROM_PORT, DIRECTION_TO_PORT, EMIT_INGRESS, EmitOrder, ORDER_ENTRIES,
        PORT_SLOTS, PortSlot, RING_BYTES, ROLE_UPLINK, Record, VERDICT_SENT, VERDICT_UNWATCHED,
        VERDICT_VETOED, WATCH_ENTRIES, WATCH_IP, WATCH_MAC, WatchKey, WatchValue, port_slots,
    },
    wire::{
        self, FRAME_MAX, HEAD, Interest, Outcome, SOURCES_HEAD, Tag, Walk, candidate, classify,
    },
};
use zerocopy::FromZeros as _;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Mapped into the agent's memory, hence the flag (`BPF_F_MMAPABLE`, Linux 5.5).
#[map]
static PORTS: Array<PortSlot> = Array::with_max_entries(PORT_SLOTS, 1 << 10);
#[map]
static WATCH: HashMap<WatchKey, WatchValue> = HashMap::with_max_entries(WATCH_ENTRIES, 0);
#[map]
static ORDERS: HashMap<[u8; 4], EmitOrder> = HashMap::with_max_entries(ORDER_ENTRIES, 0);
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Counts rounds of the agent's clock. A global and not an array of one: its address is a constant
/// in the program, so reading it is one load, without key, bounds check and null check.
#[unsafe(no_mangle)]
static EPOCH: Epoch = Epoch(UnsafeCell::new(1));

#[repr(transparent)]
struct Epoch(UnsafeCell<u32>);

// SAFETY: an aligned word that only the agent writes.
unsafe impl Sync for Epoch {}

/// What does not fit on the 512 bytes of stack. Per CPU: programs of one hook do not interrupt one
/// another there.
#[repr(C, align(8))]
struct Scratch {
    frame: [u8; FRAME_MAX],
    record: Record,
    walk: Walk,
}

/// `TC_ACT_UNSPEC`, which is also `TCX_NEXT`: the next tcx program, the next filter of clsact, or the
/// stack, as if we were not there.
const NEXT: i32 = TC_ACT_UNSPEC;

/// What a VM, or the other side of an uplink, sends.
#[classifier]
pub fn vm_ingress(ctx: TcContext) -> i32 {
    ingress(&ctx);
    NEXT
}

/// What goes to a VM.
#[classifier]
pub fn vm_egress(ctx: TcContext) -> i32 {
    // Answers are rare and nothing else is looked at: not even the port's slot, before that test.
    if ctx.is_candidate()
        && let Some(slot) = slot(ctx.ifindex())
        && !from_guest(&ctx)
    {
        dhcp::<TcContext>(ctx.raw(), slot, DIRECTION_TO_PORT);
    }
    NEXT
}

/// The same as [`vm_ingress`], for ports where frames arrive by XDP anyway.
#[xdp]
pub fn xdp_ingress(ctx: XdpContext) -> u32 {
    ingress(&ctx);
    xdp_action::XDP_PASS
}

/// Behind the agent's private link: the last look before a RELEASE leaves. Nothing else leaves.
#[classifier]
pub fn emit(ctx: TcContext) -> i32 {
    // The agent builds the frame: Ethernet, IPv4 without options, UDP.
    const XID: usize = 14 + 20 + 8 + 4;

    let Ok(xid) = ctx.load::<[u8; 4]>(XID) else {
        count(Counter::EmitNoOrder);
        return TC_ACT_SHOT;
    };
    let Some(order) = ORDERS.get_ptr_mut(xid) else {
        count(Counter::EmitNoOrder);
        return TC_ACT_SHOT;
    };
    // SAFETY: a live map value; the agent takes the order away only after the frame was handled.
    let order = unsafe { &mut *order };
    let (Some(ip), Some(mac)) = (last_seen(&order.ip), last_seen(&order.mac)) else {
        order.verdict = VERDICT_UNWATCHED;
        count(Counter::EmitVetoed);
        return TC_ACT_SHOT;
    };
    if ip > order.silent_since_ns || mac > order.silent_since_ns {
        order.verdict = VERDICT_VETOED;
        count(Counter::EmitVetoed);
        debug!(&ctx, "vetoed: seen {} ns and {} ns", ip, mac);
        return TC_ACT_SHOT;
    }
    let ifindex = order.ifindex;
    let flags = if order.direction == EMIT_INGRESS {
        u64::from(BPF_F_INGRESS)
    } else {
        0
    };
    let vlan = u16::from_be_bytes(order.vlan);
    if vlan != 0 {
        // SAFETY: the context is the one that the kernel gave us.
        let pushed = unsafe { bpf_skb_vlan_push(ctx.skb.skb, 0x8100_u16.to_be(), vlan) };
        if pushed != 0 {
            return TC_ACT_SHOT;
        }
    }
    order.verdict = VERDICT_SENT;
    count(Counter::EmitSent);
    // SAFETY: takes an interface index and flags.
    unsafe { bpf_redirect(ifindex, flags) as i32 }
}

/// What the hook alone costs: benches run it next to [`vm_ingress`]. Never attached.
#[classifier]
pub fn baseline(_ctx: TcContext) -> i32 {
    NEXT
}

/// What the TC and the XDP context have in common.
trait Context: Sized {
    type Raw;

    fn raw(&self) -> *mut Self::Raw;

    fn from_raw(raw: *mut Self::Raw) -> Self;

    fn ifindex(&self) -> u32;

    /// Length of the whole frame.
    fn len(&self) -> u32;

    fn tag(&self) -> Tag;

    /// The first `N` bytes, where the kernel lets us read them in place.
    fn head<const N: usize>(&self) -> Option<&[u8; N]>;

    /// The first `N` bytes, wherever they are.
    fn bytes<const N: usize>(&self) -> Option<[u8; N]>;

    /// Copies the first [`FRAME_MAX`] bytes, or all.
    fn copy(&self, frame: &mut [u8; FRAME_MAX]) -> bool;

    fn debug_rogue(&self);

    fn is_candidate(&self) -> bool;
}

/// The first test where the headers are not linear.
#[inline(never)]
fn scattered_candidate(skb: *mut __sk_buff) -> bool {
    match TcContext::new(skb).bytes::<HEAD>() {
        Some(head) => candidate(&head),
        None => false,
    }
}

impl Context for TcContext {
    type Raw = __sk_buff;

    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.skb.skb
    }

    #[inline(always)]
    fn from_raw(raw: *mut __sk_buff) -> Self {
        Self::new(raw)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the context that the kernel gave us.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.skb.len()
    }

    #[inline(always)]
    fn tag(&self) -> Tag {
        let skb: *const __sk_buff = self.skb.skb;
        // SAFETY: fields of the context that the kernel gave us.
        let (present, protocol, tci) =
            unsafe { ((*skb).vlan_present, (*skb).vlan_proto, (*skb).vlan_tci) };
        if present == 0 {
            return Tag::NONE;
        }
        Tag {
            protocol: u16::from_be(protocol as u16),
            tci: tci as u16,
        }
    }

    #[inline(always)]
    fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        // SAFETY: between the two pointers that the kernel gave us.
        unsafe { head(self.data(), self.data_end()) }
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self) -> Option<[u8; N]> {
        self.load(0).ok()
    }

    #[inline(always)]
    fn copy(&self, frame: &mut [u8; FRAME_MAX]) -> bool {
        let mut len = self.skb.len();
        if len > FRAME_MAX as u32 {
            len = FRAME_MAX as u32;
        }
        // A length of zero would not pass the verifier.
        if len < HEAD as u32 {
            return false;
        }
        // SAFETY: `len` is within both the frame and the buffer.
        unsafe { bpf_skb_load_bytes(self.as_ptr(), 0, frame.as_mut_ptr().cast(), len) == 0 }
    }

    #[inline(always)]
    fn is_candidate(&self) -> bool {
        if let Some(head) = self.head::<HEAD>() {
            return candidate(head);
        }
        self.len() >= HEAD as u32 && scattered_candidate(self.raw())
    }

    #[inline(always)]
    fn debug_rogue(&self) {
        debug!(self, "rogue server behind port {}", self.ifindex());
    }
}

/// XDP has all of the frame in place (a program that does not say that it can do with less is
/// refused by drivers that could not promise it); `bpf_xdp_load_bytes` would ask for Linux 5.18.
impl Context for XdpContext {
    type Raw = xdp_md;

    #[inline(always)]
    fn raw(&self) -> *mut xdp_md {
        self.ctx
    }

    #[inline(always)]
    fn from_raw(raw: *mut xdp_md) -> Self {
        Self::new(raw)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        let md: *const xdp_md = self.ctx;
        // SAFETY: a field of the context that the kernel gave us.
        unsafe { (*md).ingress_ifindex }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn tag(&self) -> Tag {
        Tag::NONE
    }

    #[inline(always)]
    fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        // SAFETY: between the two pointers that the kernel gave us.
        unsafe { head(self.data(), self.data_end()) }
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self) -> Option<[u8; N]> {
        self.head::<N>().copied()
    }

    #[inline(always)]
    fn copy(&self, frame: &mut [u8; FRAME_MAX]) -> bool {
        let (mut from, end) = (self.data(), self.data_end());
        let mut i = 0;
        while i < FRAME_MAX / 8 {
            // SAFETY: between the two pointers that the kernel gave us.
            let Some(bytes) = (unsafe { head::<8>(from, end) }) else {
                break;
            };
            let at = i * 8;
            // SAFETY: `at + 8` is within the buffer, which is aligned to 8.
            unsafe {
                let word = ptr::read_unaligned(bytes.as_ptr().cast::<u64>());
                ptr::write(frame.as_mut_ptr().add(at).cast(), word);
            }
            from += 8;
            i += 1;
        }
        // The last, unaligned word: some of its bytes come twice.
        // Volatile: the compiler finds that the bytes end at `end`, and reads backwards from there,
        // which the verifier forbids.
        let tail = (end - self.data()).wrapping_sub(8);
        // SAFETY: a local variable.
        let tail = unsafe { ptr::read_volatile(&raw const tail) };
        if tail <= FRAME_MAX - 8 {
            // SAFETY: between the two pointers that the kernel gave us.
            let Some(bytes) = (unsafe { head::<8>(self.data() + tail, end) }) else {
                return false;
            };
            let mut at = 0;
            while at < 8 {
                frame[(tail + at) & (FRAME_MAX - 1)] = bytes[at];
                at += 1;
            }
        }
        true
    }

    #[inline(always)]
    fn is_candidate(&self) -> bool {
        match self.head::<HEAD>() {
            Some(head) => candidate(head),
            None => false,
        }
    }

    #[inline(always)]
    fn debug_rogue(&self) {
        debug!(self, "rogue server behind port {}", self.ifindex());
    }
}

/// The one bounds check: `N` bytes from `data`, if they lie before `end`.
///
/// # Safety
///
/// The pointers are a context's `data` (or behind it) and `data_end`, and no helper that moves the
/// frame is called while the reference lives.
#[inline(always)]
unsafe fn head<'a, const N: usize>(data: usize, end: usize) -> Option<&'a [u8; N]> {
    if data + N > end {
        return None;
    }
    // SAFETY: as above.
    Some(unsafe { &*(data as *const [u8; N]) })
}

/// What is rare is behind calls: the fewer registers the common way uses, the fewer are saved.
#[inline(always)]
fn ingress<C: Context>(ctx: &C) {
    let Some(slot) = slot(ctx.ifindex()) else {
        return;
    };
    // SAFETY: see `Epoch`; volatile, since the agent writes it while we run.
    let epoch = unsafe { ptr::read_volatile(EPOCH.0.get()) };
    // Looked at before it is stored: the line stays shared while nothing changes.
    if slot.seen_epoch != epoch && !(slot.role == ROLE_UPLINK && is_link_local(ctx)) {
        slot.seen_epoch = epoch;
    }
    if slot.exact != 0 {
        sight::<C>(ctx.raw(), slot.segment, slot.pvid);
    }
    if ctx.is_candidate() {
        dhcp::<C>(ctx.raw(), slot, DIRECTION_FROM_PORT);
    }
}

/// Whether it comes from the next switch and no farther: that speaks by a port that it blocks, too,
/// so that nothing is known of the way beyond.
#[inline(always)]
fn is_link_local<C: Context>(ctx: &C) -> bool {
    ctx.head::<6>().is_some_and(wire::is_link_local)
}

/// The port's slot, if it is the port's.
#[inline(always)]
fn slot(ifindex: u32) -> Option<&'static mut PortSlot> {
    let [first, second] = port_slots(ifindex);
    let slot = PORTS.get_ptr_mut(first)?;
    // SAFETY: a live map value; what races with other CPUs is harmless (see `PortSlot`).
    let slot = unsafe { &mut *slot };
    if slot.ifindex == ifindex {
        return Some(slot);
    }
    let is_taken = slot.ifindex != 0;
    // SAFETY: the same.
    let slot = unsafe { &mut *PORTS.get_ptr_mut(second)? };
    if slot.ifindex == ifindex {
        return Some(slot);
    }
    if is_taken {
        count(Counter::SlotTaken);
    }
    None
}

/// The exact tier: notes the sources of a frame, where they are watched.
#[inline(never)]
fn sight<C: Context>(raw: *mut C::Raw, segment: u32, pvid: u16) {
    let ctx = C::from_raw(raw);
    let sources = if let Some(head) = ctx.head::<SOURCES_HEAD>() {
        wire::sources(head, ctx.tag())
    } else if let Some(head) = ctx.bytes::<SOURCES_HEAD>() {
        wire::sources(&head, ctx.tag())
    } else if let Some(ethernet) = ctx.bytes::<14>() {
        let mut head = [0; SOURCES_HEAD];
        head[..14].copy_from_slice(&ethernet);
        wire::sources(&head, ctx.tag())
    } else {
        return;
    };
    let ifindex = ctx.ifindex();
    let mut key = WatchKey {
        segment,
        vlan: vlan_of(sources.vlan, pvid),
        kind: WATCH_MAC,
        reserved: 0,
        address: [0; 8],
    };
    key.address[..6].copy_from_slice(&sources.mac);
    let now = note(&key, 0, ifindex, sources.mac);
    if sources.ip != [0; 4] {
        key.kind = WATCH_IP;
        key.address = [0; 8];
        key.address[..4].copy_from_slice(&sources.ip);
        note(&key, now, ifindex, sources.mac);
    }
}

/// What a frame belongs to: as a bridge that filters VLANs sees it on the port. On the way out the
/// bridge has taken the tag away again.
#[inline(always)]
fn vlan_of(tag: [u8; 2], pvid: u16) -> [u8; 2] {
    if u16::from_be_bytes(tag) == 0 {
        pvid.to_be_bytes()
    } else {
        tag
    }
}

/// Notes a source if it is watched. Looks at the clock only then, and once a frame: `now` is what
/// came back for the source before.
#[inline(always)]
fn note(key: &WatchKey, mut now: u64, ifindex: u32, mac: [u8; 6]) -> u64 {
    if let Some(value) = WATCH.get_ptr_mut(key) {
        if now == 0 {
            // SAFETY: takes no argument.
            now = unsafe { bpf_ktime_get_ns() };
        }
        // SAFETY: a live map value; what races with other CPUs is harmless (see `WatchValue`).
        unsafe { (*value).note(ifindex, now, mac) };
    }
    now
}

/// When a watched address was last seen; `None` if it is not watched.
#[inline(always)]
fn last_seen(key: &WatchKey) -> Option<u64> {
    let value = WATCH.get_ptr(key)?;
    // SAFETY: a live map value.
    Some(unsafe { (*value).latest_ns() })
}

#[inline(never)]
fn dhcp<C: Context>(raw: *mut C::Raw, slot: &mut PortSlot, direction: u8) {
    let ctx = &C::from_raw(raw);
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: a live map value of this CPU.
    let scratch = unsafe { &mut *scratch };
    if !ctx.copy(&mut scratch.frame) {
        return;
    }
    let record = &mut scratch.record;
    record.zero();
    match classify(
        &scratch.frame,
        ctx.len(),
        ctx.tag(),
        &mut scratch.walk,
        record,
    ) {
        Outcome::Other => return,
        Outcome::Truncated => return count(Counter::Truncated),
        Outcome::NotDhcp => return count(Counter::NotDhcp),
        Outcome::Message => count(Counter::Dhcp),
    }
    record.vlan = vlan_of(record.vlan, slot.pvid);
    if record.anomalies != 0 {
        count(Counter::Ambiguous);
    }
    match wire::interest(slot.role, direction, record) {
        Interest::Nobody => return,
        Interest::Push => {}
        Interest::PushAndRemember => slot.remember(record.xid),
        Interest::PushIfAsked => {
            if !slot.asked(record.xid) {
                return count(Counter::Unasked);
            }
        }
        Interest::Rogue => {
            count(Counter::RogueServer);
            ctx.debug_rogue();
        }
    }
    record.ifindex = ctx.ifindex();
    record.direction = direction;
    record.role = slot.role;
    push(slot, record);
}

/// Whether a frame on its way out came in by a port of ours that is no uplink. What is said there in
/// a server's name is heard as a rogue's; it is no answer, also when that record was lost.
#[inline(never)]
fn from_guest(ctx: &TcContext) -> bool {
    // SAFETY: a field of the context that the kernel gave us.
    let came_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    came_by != 0 && slot(came_by).is_some_and(|slot| slot.role != ROLE_UPLINK)
}

/// Hands the record to the agent, or counts why not.
#[inline(always)]
fn push(slot: &mut PortSlot, record: &mut Record) {
    const AVAILABLE_DATA: u64 = 0;
    const RING_SIZE: u64 = 1;

    // SAFETY: takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    if !slot.take_token(now) {
        slot.lost = slot.lost.wrapping_add(1);
        return count(Counter::RateLimited);
    }
    // The last quarter is for what servers say: a VM cannot fill it.
    let from_guest = record.role != ROLE_UPLINK && record.direction == DIRECTION_FROM_PORT;
    if from_guest && RECORDS.query(AVAILABLE_DATA) > RECORDS.query(RING_SIZE) / 4 * 3 {
        slot.lost = slot.lost.wrapping_add(1);
        return count(Counter::RingFull);
    }
    record.seen_ns = now;
    record.lost = slot.lost;
    // Flags 0: the agent is woken only if it has read all before. A forced wake-up costs 5 us.
    if RECORDS.output::<Record>(&*record, 0).is_err() {
        slot.lost = slot.lost.wrapping_add(1);
        return count(Counter::RingFull);
    }
    count(Counter::Records);
}

#[inline(always)]
fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a live map value of this CPU.
        unsafe { *value += 1 };
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
