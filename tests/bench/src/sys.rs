//! What no crate of ours offers: programs by the byte, test runs by the fd, filters and taps.
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;

const BPF_PROG_LOAD: i64 = 5;
const BPF_OBJ_PIN: i64 = 6;
const BPF_PROG_TEST_RUN: i64 = 10;
const BPF_LINK_CREATE: i64 = 28;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 2;
/// Frames that a live test run hands on at once: as many as NAPI does.
const LIVE_BATCH: u32 = 64;

/// `enum bpf_prog_type`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Classifier = 3,
    Xdp = 6,
}

/// `enum bpf_attach_type`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// An instruction: opcode, registers (source << 4 | destination), offset, immediate.
type Insn = (u8, u8, i16, i32);

/// Returns at once: `TCX_NEXT` (-1) or `XDP_PASS` (2).
fn empty(kind: Kind) -> Vec<Insn> {
    let verdict = match kind {
        Kind::Classifier => -1,
        Kind::Xdp => 2,
    };
    vec![(0xb7, 0, 0, verdict), (0x95, 0, 0, 0)]
}

/// Draws the last two bytes of the Ethernet and of the IPv4 source.
fn random_sources() -> Vec<Insn> {
    vec![
        (0xbf, 0x16, 0, 0),  // r6 = context
        (0x85, 0, 0, 7),     // r0 = bpf_get_prandom_u32()
        (0x61, 0x62, 0, 0),  // r2 = data
        (0x61, 0x63, 4, 0),  // r3 = data_end
        (0xbf, 0x24, 0, 0),  // r4 = r2
        (0x07, 0x04, 0, 34), // r4 += 34
        (0x2d, 0x34, 2, 0),  // if r4 > r3 goto +2
        (0x6b, 0x02, 10, 0), // *(u16 *)(r2 + 10) = r0
        (0x6b, 0x02, 28, 0), // *(u16 *)(r2 + 28) = r0
        (0xb7, 0, 0, 2),     // XDP_PASS
        (0x95, 0, 0, 0),
    ]
}

pub fn empty_program(kind: Kind) -> Result<OwnedFd> {
    load(kind, &empty(kind))
}

pub fn random_sources_program() -> Result<OwnedFd> {
    load(Kind::Xdp, &random_sources())
}

fn load(kind: Kind, code: &[Insn]) -> Result<OwnedFd> {
    let mut bytes = Vec::new();
    for (opcode, registers, offset, immediate) in code {
        bytes.extend([*opcode, *registers]);
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(immediate.to_ne_bytes());
    }
    let license = c"GPL";
    let mut attr = Attr::default();
    attr.u32(0, kind as u32);
    attr.u32(4, u32::try_from(code.len())?);
    attr.u64(8, bytes.as_ptr() as u64);
    attr.u64(16, license.as_ptr() as u64);
    // SAFETY: the pointers in the attribute live for the call.
    unsafe { attr.call(BPF_PROG_LOAD) }.and_then(owned)
}

/// Attaches for as long as the link is held.
pub fn attach(program: BorrowedFd<'_>, ifindex: u32, place: Place, flags: u32) -> Result<OwnedFd> {
    let mut attr = Attr::default();
    attr.u32(0, program.as_raw_fd().cast_unsigned());
    attr.u32(4, ifindex);
    attr.u32(8, place as u32);
    attr.u32(12, flags);
    // SAFETY: no pointers.
    unsafe { attr.call(BPF_LINK_CREATE) }.and_then(owned)
}

pub fn pin(program: BorrowedFd<'_>, path: &str) -> Result<()> {
    let path = std::ffi::CString::new(path)?;
    let mut attr = Attr::default();
    attr.u64(0, path.as_ptr() as u64);
    attr.u32(8, program.as_raw_fd().cast_unsigned());
    // SAFETY: the path lives for the call.
    unsafe { attr.call(BPF_OBJ_PIN) }.map(drop)
}

/// Nanoseconds that one run over the frame takes, by the kernel's own clock. It reports whole ones:
/// the median of many is finer than that only where runs differ.
pub fn test_run(program: BorrowedFd<'_>, frame: &[u8], repeat: u32) -> Result<f64> {
    let before = cpu_time()?;
    let mut attr = Attr::default();
    attr.u32(0, program.as_raw_fd().cast_unsigned());
    attr.u32(8, u32::try_from(frame.len())?);
    attr.u64(16, frame.as_ptr() as u64);
    attr.u32(32, repeat);
    // SAFETY: the frame lives for the call.
    unsafe { attr.call(BPF_PROG_TEST_RUN) }?;
    let spent = cpu_time()? - before;
    Ok(spent.as_nanos() as f64 / f64::from(repeat))
}

/// Hands frames to the stack as if `lo` had received them; returns nanoseconds for each.
pub fn receive(generator: BorrowedFd<'_>, frame: &[u8], count: u32) -> Result<f64> {
    let before = cpu_time()?;
    let mut attr = Attr::default();
    attr.u32(0, generator.as_raw_fd().cast_unsigned());
    attr.u32(8, u32::try_from(frame.len())?);
    attr.u64(16, frame.as_ptr() as u64);
    attr.u32(32, count);
    attr.u32(64, BPF_F_TEST_XDP_LIVE_FRAMES);
    attr.u32(72, LIVE_BATCH);
    // SAFETY: the frame lives for the call.
    unsafe { attr.call(BPF_PROG_TEST_RUN) }?;
    let spent = cpu_time()? - before;
    Ok(spent.as_nanos() as f64 / f64::from(count))
}

/// The processor's time of this thread: what others use of the machine is not in it.
pub fn cpu_time() -> Result<Duration> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(Duration::from(time))
}

/// `union bpf_attr`, by offsets.
#[repr(C, align(8))]
struct Attr([u8; 152]);

impl Default for Attr {
    fn default() -> Self {
        Self([0; 152])
    }
}

impl Attr {
    fn u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }

    /// # Safety
    ///
    /// Pointers in the attribute are valid for what the command does with them.
    unsafe fn call(&mut self, command: i64) -> Result<i64> {
        // SAFETY: the attribute has the size that is given; the rest is the caller's.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        Errno::result(result).with_context(|| format!("bpf({command})"))
    }
}

fn owned(fd: i64) -> Result<OwnedFd> {
    // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}

/// A packet socket on one interface behind a filter: what tcpdump or an agent without eBPF has there.
/// `filter` is what `tcpdump -ddd` prints.
pub fn packet_socket(ifindex: u32, filter: &str) -> Result<OwnedFd> {
    const ALL: u16 = 0x0003;

    let mut code = Vec::new();
    for line in filter.lines().skip(1) {
        let numbers: Vec<u32> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [opcode, jt, jf, k] = numbers[..] else {
            anyhow::bail!("not a filter: {line:?}");
        };
        code.push(libc::sock_filter {
            code: opcode.try_into()?,
            jt: jt.try_into()?,
            jf: jf.try_into()?,
            k,
        });
    }
    ensure!(!code.is_empty(), "an empty filter");
    // Protocol zero: nothing is heard before the filter is there.
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes and returns integers.
    let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    let socket = owned(fd.into())?;
    let program = libc::sock_fprog {
        len: code.len().try_into()?,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: the option has the size that is given, and the filter lives for the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(set).context("SO_ATTACH_FILTER")?;
    // SAFETY: all zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ALL.to_be();
    address.sll_ifindex = ifindex.cast_signed();
    // SAFETY: the address is of the family and the size that are given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    Errno::result(bound).context("cannot bind a packet socket")?;
    Ok(socket)
}

/// A tap in the net namespace of this thread, as qemu without vhost has it.
pub fn tap(name: &str) -> Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const IFF_TAP: i16 = 0x0002;
    const IFF_NO_PI: i16 = 0x1000;

    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&(IFF_TAP | IFF_NO_PI).to_ne_bytes());
    // SAFETY: the request has the size of a `struct ifreq`.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    Errno::result(made).context("TUNSETIFF")?;
    Ok(file)
}

/// Keeps this thread on one processor.
pub fn stay_on(cpu: usize) -> io::Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
    Ok(())
}
