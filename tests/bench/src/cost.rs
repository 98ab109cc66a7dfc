//! What the programs cost on other people's packets.
use std::{
    fs::{self, File},
    io::Write as _,
    net::Ipv4Addr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path as FsPath,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{
    Program, SchedClassifier, TcAttachType,
    tc::{self, NlOptions, TcAttachOptions},
};
use dhcp_reclaim_agent::{
    core::{MacAddr, Port, Role},
    kernel::{AttachedHook, Hook, Kernel, LoadOptions, watch_ip, watch_mac},
};
use dhcp_reclaim_ebpf::wire::vectors::{Builder, CLIENT_IP, CLIENT_MAC, arp, tcp};
use dhcp_reclaim_tests::{
    netns::NetNs,
    report::Row,
    sandbox::{BPFFS, run},
};
use nix::net::if_::if_nametoindex;

use crate::{
    stats::{Median, median},
    sys::{self, Kind, Place},
};

const SEGMENT: u32 = 7;
/// As many as WATCH has room for, a MAC and an address each.
const MANY: u32 = 65_536;
const DHCP: &str = "udp port 67 or udp port 68";

pub fn rows(quick: bool) -> Result<Vec<Row>> {
    // Traffic on one processor; what else is to be done finds the other.
    sys::stay_on(0)?;
    NetNs::current()?.init()?;
    let mut world = World::new()?;
    let mut rows = test_runs(&mut world, if quick { 9 } else { 25 })?;
    let rounds = if quick { 9 } else { 31 };
    rows.extend(path(&mut world, &Path::receive()?, rounds)?);
    rows.extend(path(&mut world, &Path::tap()?, rounds)?);
    Ok(rows)
}

/// Programs of every kind, loaded once.
struct World {
    tc: Kernel,
    clsact: Kernel,
    xdp: Kernel,
    empty: OwnedFd,
    empty_again: OwnedFd,
    empty_xdp: OwnedFd,
    dhcp_filter: String,
    arp_filter: String,
    armed: u32,
}

impl World {
    fn new() -> Result<Self> {
        Ok(Self {
            tc: kernel(Hook::Tc)?,
            clsact: kernel(Hook::Clsact)?,
            xdp: kernel(Hook::Xdp)?,
            empty: sys::empty_program(Kind::Classifier)?,
            empty_again: sys::empty_program(Kind::Classifier)?,
            empty_xdp: sys::empty_program(Kind::Xdp)?,
            dhcp_filter: filter(DHCP)?,
            arp_filter: filter("arp")?,
            armed: 0,
        })
    }

    /// Watches the first `count` of the many addresses, and no other.
    fn arm(&mut self, count: u32) -> Result<()> {
        for n in self.armed..count {
            for key in keys(n) {
                self.tc.arm(&key)?;
            }
        }
        for n in count..self.armed {
            for key in keys(n) {
                self.tc.disarm(&key)?;
            }
        }
        self.armed = count;
        Ok(())
    }
}

fn keys(n: u32) -> [dhcp_reclaim_ebpf::abi::WatchKey; 2] {
    let [_, _, high, low] = n.to_be_bytes();
    [
        watch_mac(SEGMENT, 0, MacAddr([2, 0, 0, 0, high, low])),
        watch_ip(SEGMENT, 0, Ipv4Addr::new(192, 0, high, low)),
    ]
}

pub fn kernel(hook: Hook) -> Result<Kernel> {
    // One for each: an earlier one may hold its own.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let bpffs = FsPath::new(BPFFS).join(format!("kernel{number}"));
    fs::create_dir_all(&bpffs)?;
    let options = LoadOptions {
        bpffs,
        hook,
        ..LoadOptions::default()
    };
    Ok(Kernel::load(&options)?)
}

fn filter(expression: &str) -> Result<String> {
    run(Command::new("tcpdump").args(["-i", "lo", "-ddd", expression]))
}

fn fd<'a>(kernel: &'a Kernel, name: &str) -> Result<BorrowedFd<'a>> {
    let program = kernel.ebpf().program(name).context("no such program")?;
    let fd = match program {
        Program::SchedClassifier(program) => program.fd()?,
        Program::Xdp(program) => program.fd()?,
        other => anyhow::bail!("{:?}", other.prog_type()),
    };
    Ok(fd.as_fd())
}

/// Base, mode, base: the mode against the mean of its neighbours.
fn paired(
    rounds: usize,
    mut base: impl FnMut() -> Result<f64>,
    mut mode: impl FnMut() -> Result<f64>,
) -> Result<(Median, f64)> {
    let mut differences = Vec::new();
    let mut bases = vec![base()?];
    for _ in 0..rounds {
        let there = mode()?;
        bases.push(base()?);
        let [.., before, after] = bases[..] else {
            continue;
        };
        differences.push(there - f64::midpoint(before, after));
    }
    Ok((median(&differences), median(&bases).value))
}

pub fn port(name: &str) -> Result<Port> {
    Ok(Port {
        ifindex: if_nametoindex(name)?,
        name: name.to_owned(),
        segment: SEGMENT,
        role: Role::Vm,
    })
}

fn test_runs(world: &mut World, rounds: usize) -> Result<Vec<Row>> {
    const REPEAT: u32 = 100_000;
    const SECTION: &str = "cost: the program alone";

    let lo = port("lo")?;
    world.tc.watch(&lo, 0, 0)?;
    world.xdp.watch(&lo, 0, 0)?;
    let dns = Builder::selecting()
        .with(|b| b.destination_port = 53)
        .build();
    let mut lldp = tcp();
    lldp[12..14].copy_from_slice(&[0x88, 0xcc]);
    let frames = [
        ("not IP", lldp),
        ("TCP", tcp()),
        ("UDP", dns),
        ("ARP", arp(CLIENT_MAC, CLIENT_IP)),
    ];
    let mut rows = Vec::new();
    let measure = |world: &World, name: String, program: &str, frame: &[u8]| -> Result<Row> {
        let (floor, there) = match program {
            "" => (world.empty.as_fd(), world.empty_again.as_fd()),
            "xdp_ingress" => (world.empty_xdp.as_fd(), fd(&world.xdp, program)?),
            _ => (world.empty.as_fd(), fd(&world.tc, program)?),
        };
        let (found, base) = paired(
            rounds,
            || sys::test_run(floor, frame, REPEAT),
            || sys::test_run(there, frame, REPEAT),
        )?;
        Ok(Row::new(SECTION, name, found.value, "ns")
            .interval(found.interval)
            .beside("an empty program's whole run", base))
    };
    rows.push(measure(
        world,
        "null test: one empty program, another".into(),
        "",
        &frames[1].1,
    )?);
    for (name, frame) in &frames {
        let row = measure(
            world,
            format!("{name}, from a VM: no check due"),
            "vm_ingress",
            frame,
        )?;
        let met = row.value <= 5.0;
        rows.push(row.goal("at most empty + 5 ns", met));
    }
    rows.push(measure(
        world,
        "TCP, to a VM".into(),
        "vm_egress",
        &frames[1].1,
    )?);
    for (name, frame) in &frames {
        rows.push(measure(
            world,
            format!("{name}, from a VM: XDP, no check due"),
            "xdp_ingress",
            frame,
        )?);
    }
    world.tc.set_exact(lo.ifindex, true);
    for armed in [0, 1000, MANY] {
        world.arm(armed)?;
        for (name, frame) in &frames {
            let mut frame = frame.clone();
            // Nobody's.
            frame[6..12].copy_from_slice(&[2, 1, 1, 1, 1, 1]);
            if *name != "not IP" {
                let sender = if *name == "ARP" { 28 } else { 26 };
                frame[sender..sender + 4].copy_from_slice(&[203, 0, 113, 1]);
            }
            let name = format!("{name}, from a VM: a check due, {armed} watched, not this one");
            rows.push(measure(world, name, "vm_ingress", &frame)?);
        }
    }
    for armed in [1000, MANY] {
        world.arm(armed)?;
        for (name, frame) in &frames {
            let name = format!("{name}, from a VM: a check due, {armed} watched, this one too");
            rows.push(measure(world, name, "vm_ingress", frame)?);
        }
    }
    world.tc.set_exact(lo.ifindex, false);
    world.tc.unwatch(lo.ifindex);
    world.xdp.unwatch(lo.ifindex);
    Ok(rows)
}

/// A way of frames into the stack.
struct Path {
    section: &'static str,
    link: &'static str,
    ifindex: u32,
    burst: u32,
    way: Way,
    modes: &'static [Mode],
}

enum Way {
    Receive { plain: OwnedFd, random: OwnedFd },
    Tap(File),
}

impl Path {
    /// As from a network card that polls: batches, without a system call for each.
    fn receive() -> Result<Self> {
        Ok(Self {
            section: "cost: receive into the stack",
            link: "lo",
            ifindex: if_nametoindex("lo")?,
            burst: 30_000,
            way: Way::Receive {
                plain: sys::empty_program(Kind::Xdp)?,
                random: sys::random_sources_program()?,
            },
            modes: &[
                Mode::Nothing,
                Mode::Empty(AttachedHook::Tcx),
                Mode::Agent(AttachedHook::Tcx),
                Mode::Watched,
                Mode::OnePacketSocket,
                Mode::TwoPacketSockets,
                Mode::Empty(AttachedHook::Clsact),
                Mode::Agent(AttachedHook::Clsact),
                Mode::Empty(AttachedHook::XdpGeneric),
                Mode::Agent(AttachedHook::XdpGeneric),
                Mode::CheckDue,
            ],
        })
    }

    fn tap() -> Result<Self> {
        let tap = sys::tap("tap0")?;
        NetNs::current()?.ip("link set tap0 up")?;
        Ok(Self {
            section: "cost: tap write",
            link: "tap0",
            ifindex: if_nametoindex("tap0")?,
            burst: 20_000,
            way: Way::Tap(tap),
            modes: &[
                Mode::Nothing,
                Mode::Empty(AttachedHook::Tcx),
                Mode::Agent(AttachedHook::Tcx),
                Mode::Watched,
                Mode::OnePacketSocket,
                Mode::TwoPacketSockets,
                Mode::Empty(AttachedHook::Clsact),
                Mode::Agent(AttachedHook::Clsact),
                Mode::Empty(AttachedHook::XdpNative),
                Mode::Agent(AttachedHook::XdpNative),
                Mode::CheckDue,
            ],
        })
    }

    /// Nanoseconds a frame; with random sources out of the many, or always the same.
    fn burst(&self, random: bool) -> Result<f64> {
        let mut frame = tcp();
        match &self.way {
            Way::Receive {
                plain,
                random: drawn,
            } => {
                let generator = if random { drawn } else { plain };
                sys::receive(generator.as_fd(), &frame, self.burst)
            }
            Way::Tap(tap) => {
                let mut tap = tap;
                let mut state = 0x9e37_79b9_u32;
                let before = sys::cpu_time()?;
                for _ in 0..self.burst {
                    if random {
                        state ^= state << 13;
                        state ^= state >> 17;
                        state ^= state << 5;
                        let [.., high, low] = state.to_be_bytes();
                        frame[10..12].copy_from_slice(&[high, low]);
                        frame[28..30].copy_from_slice(&[high, low]);
                    }
                    tap.write_all(&frame)?;
                }
                let spent = sys::cpu_time()? - before;
                Ok(spent.as_nanos() as f64 / f64::from(self.burst))
            }
        }
    }
}

/// What sits at the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nothing,
    Empty(AttachedHook),
    /// The agent's program, and nobody watched.
    Agent(AttachedHook),
    /// The same with 65,536 addresses watched, this one among them, and its evidence complete.
    Watched,
    /// The same while a check is due at this port: each frame is looked up.
    CheckDue,
    OnePacketSocket,
    TwoPacketSockets,
}

impl Mode {
    fn name(self) -> String {
        match self {
            Self::Nothing => "null test: nothing against nothing".into(),
            Self::Empty(hook) => format!("an empty program ({})", hook.name()),
            Self::Agent(hook) => format!("TCP from a VM, unwatched ({})", hook.name()),
            Self::Watched => "TCP from a watched VM, no check due (tcx)".into(),
            Self::CheckDue => "TCP from a watched VM while a check is due (tcx)".into(),
            Self::OnePacketSocket => format!("an AF_PACKET socket: {DHCP}"),
            Self::TwoPacketSockets => "two of them: DHCP and ARP".into(),
        }
    }

    /// Puts it there, measures, and takes it away again.
    fn measure(self, world: &mut World, path: &Path, random: bool) -> Result<f64> {
        let port = port(path.link)?;
        let hook_of = |hook| match hook {
            AttachedHook::Tcx => Hook::Tc,
            AttachedHook::Clsact => Hook::Clsact,
            AttachedHook::XdpNative | AttachedHook::XdpGeneric => Hook::Xdp,
        };
        match self {
            Self::Nothing => path.burst(random),
            Self::Empty(AttachedHook::Tcx) => {
                let _link = sys::attach(world.empty.as_fd(), path.ifindex, Place::TcxIngress, 0)?;
                // Both ways, as the agent has it.
                let _out = sys::attach(world.empty.as_fd(), path.ifindex, Place::TcxEgress, 0)?;
                path.burst(random)
            }
            Self::Empty(AttachedHook::Clsact) => {
                let _filter = Filter::attach(world, path.link)?;
                path.burst(random)
            }
            Self::Empty(hook) => {
                // XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE
                let flags = if hook == AttachedHook::XdpGeneric {
                    2
                } else {
                    4
                };
                let _link = sys::attach(world.empty_xdp.as_fd(), path.ifindex, Place::Xdp, flags)?;
                path.burst(random)
            }
            Self::Agent(_) | Self::Watched | Self::CheckDue => {
                let hook = match self {
                    Self::Agent(hook) => hook,
                    _ => AttachedHook::Tcx,
                };
                let kernel = match hook_of(hook) {
                    Hook::Tc => &mut world.tc,
                    Hook::Clsact => &mut world.clsact,
                    Hook::Xdp => &mut world.xdp,
                };
                let attached = kernel.watch(&port, 0, 0)?;
                ensure!(
                    attached == hook,
                    "{} instead of {}",
                    attached.name(),
                    hook.name()
                );
                kernel.set_exact(port.ifindex, self == Self::CheckDue);
                let spent = path.burst(random);
                kernel.unwatch(port.ifindex);
                spent
            }
            Self::OnePacketSocket => {
                let _socket = sys::packet_socket(path.ifindex, &world.dhcp_filter)?;
                path.burst(random)
            }
            Self::TwoPacketSockets => {
                let _dhcp = sys::packet_socket(path.ifindex, &world.dhcp_filter)?;
                let _arp = sys::packet_socket(path.ifindex, &world.arp_filter)?;
                path.burst(random)
            }
        }
    }
}

/// An empty program on both sides of a clsact.
struct Filter {
    program: SchedClassifier,
    link: String,
}

impl Filter {
    fn attach(world: &World, link: &str) -> Result<Self> {
        let path = format!("{BPFFS}/empty");
        // Left from the round before.
        let _ = fs::remove_file(&path);
        sys::pin(world.empty.as_fd(), &path)?;
        let mut program = SchedClassifier::from_pin(&path)?;
        let _there = tc::qdisc_add_clsact(link);
        for way in [TcAttachType::Ingress, TcAttachType::Egress] {
            let options = TcAttachOptions::Netlink(NlOptions::default());
            program.attach_with_options(link, way, options)?;
        }
        Ok(Self {
            program,
            link: link.to_owned(),
        })
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        // What fails here fails the next round's comparison, which shows in the null test.
        let _ = self.program.unload();
        let _ = Command::new("tc")
            .args(["qdisc", "del", "dev", &self.link, "clsact"])
            .status();
    }
}

fn path(world: &mut World, path: &Path, rounds: usize) -> Result<Vec<Row>> {
    // `Watched` and `CheckDue` have them; without a check nobody looks.
    world.arm(MANY)?;
    let mut differences = vec![Vec::new(); path.modes.len()];
    let mut bases = Vec::new();
    // The first ones pay for cold caches.
    path.burst(false)?;
    for round in 0..rounds {
        let mut before = path.burst(false)?;
        for step in 0..path.modes.len() {
            let at = (step + round) % path.modes.len();
            let there = path.modes[at].measure(world, path, false)?;
            let after = path.burst(false)?;
            differences[at].push(there - f64::midpoint(before, after));
            bases.push(before);
            before = after;
        }
    }
    let found: Vec<Median> = differences.iter().map(|samples| median(samples)).collect();
    let of = |mode: Mode| {
        let at = path.modes.iter().position(|this| *this == mode);
        at.map(|at| found[at]).context("not measured")
    };
    let one = of(Mode::OnePacketSocket)?;
    let mut rows = vec![Row::new(
        path.section,
        "a frame's way without anything",
        median(&bases).value,
        "ns",
    )];
    for (mode, found) in path.modes.iter().zip(&found) {
        let mut row = Row::new(path.section, mode.name(), found.value, "ns")
            .interval(found.interval)
            .beside("one AF_PACKET socket", one.value);
        match mode {
            Mode::Agent(AttachedHook::Tcx) => {
                let empty = of(Mode::Empty(AttachedHook::Tcx))?;
                let met = found.value <= empty.interval[1];
                row = row.goal("within the empty program's interval", met);
            }
            Mode::Watched => {
                let empty = of(Mode::Empty(AttachedHook::Tcx))?;
                row = row.goal("at most empty + 10 ns", found.value <= empty.value + 10.0);
                if matches!(path.way, Way::Tap(_)) {
                    let half = found.value <= one.value / 2.0;
                    rows.push(
                        row.clone()
                            .goal("at most half of one AF_PACKET socket", half),
                    );
                }
            }
            _ => {}
        }
        rows.push(row);
    }
    // The same, from any of the many: each frame finds other lines of the hash.
    let mut found = Vec::new();
    for mode in [Mode::Nothing, Mode::CheckDue] {
        let differences = (0..rounds).map(|_| {
            let before = path.burst(true)?;
            let there = mode.measure(world, path, true)?;
            Ok(there - f64::midpoint(before, path.burst(true)?))
        });
        found.push(median(&differences.collect::<Result<Vec<_>>>()?));
    }
    for (found, name) in found.iter().zip([
        "null test, random sources",
        "TCP from any of 65,536 watched VMs while a check is due (tcx)",
    ]) {
        rows.push(
            Row::new(path.section, name, found.value, "ns")
                .interval(found.interval)
                .beside("one AF_PACKET socket", one.value),
        );
    }
    Ok(rows)
}
