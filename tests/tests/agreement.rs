//! The classifier in the kernel reads what it reads on the host: over every vector, every entry of
//! the corpus, every captured frame, and mutants of them all.

#[expect(dead_code, reason = "shared with the other suites")]
mod world;

mod seeds;

use dhcp_reclaim_agent::{
    core::Role,
    kernel::{Hook, Kernel, RecordRing},
};
use dhcp_reclaim_ebpf::{
    abi::{
        DIRECTION_FROM_PORT, DIRECTION_TO_PORT, PortSlot, ROLE_ASIDE, ROLE_UPLINK, ROLE_VM, Record,
    },
    wire::{
        Interest, Outcome, Tag, classify_frame, interest,
        vectors::{Builder, XID},
    },
};
use dhcp_reclaim_tests::{clock::now, mutate::Mutator};
use seeds::{Shown, count, seeds};
use world::{LO, alone, load, port, run_tc, run_xdp, runtime};
use zerocopy::FromZeros as _;

const NEXT: u32 = u32::MAX;
const XDP_PASS: u32 = 2;
/// Frames between two looks at the ring, which holds ten times as many.
const ROUND: usize = 1000;

#[test]
fn tc_agrees_about_what_a_vm_sends() {
    alone(|| agree(Hook::Tc, Role::Vm, DIRECTION_FROM_PORT));
}

#[test]
fn tc_agrees_about_what_a_vm_is_told() {
    alone(|| agree(Hook::Tc, Role::Vm, DIRECTION_TO_PORT));
}

#[test]
fn tc_agrees_about_an_uplink() {
    alone(|| agree(Hook::Tc, Role::Uplink, DIRECTION_FROM_PORT));
}

#[test]
fn xdp_agrees_about_what_a_vm_sends() {
    alone(|| agree(Hook::Xdp, Role::Vm, DIRECTION_FROM_PORT));
}

#[test]
fn xdp_agrees_about_an_uplink() {
    alone(|| agree(Hook::Xdp, Role::Uplink, DIRECTION_FROM_PORT));
}

fn agree(hook: Hook, role: Role, direction: u8) {
    let (seeds, short): (Vec<_>, Vec<_>) = seeds().into_iter().partition(|(_, it)| can_run(it));
    for (name, frame) in &short {
        let (outcome, _) = classify_frame(frame, Tag::NONE);
        assert_ne!(outcome, Outcome::Message, "{name} is to be run");
    }
    let mut pair = Pair::new(hook, role, direction);
    for (name, frame) in &seeds {
        pair.run(name, frame);
        pair.settle();
    }
    let pushed = pair.pushed;
    assert!(pushed > 3, "only {pushed} records of {}", seeds.len());

    let mutants = count(40_000) / 4;
    let mut frames: Vec<_> = seeds.into_iter().map(|(_, frame)| frame).collect();
    if direction == DIRECTION_TO_PORT {
        // All others are nobody's answer, nearly always.
        frames.retain(|frame| {
            let (outcome, record) = classify_frame(frame, Tag::NONE);
            outcome == Outcome::Message && record.op == 2 && record.xid == XID
        });
    }
    let mut mutator = Mutator::new(u64::from(direction) << 8 | hook as u64, &frames);
    let mut frame = Vec::new();
    let begin = now();
    for round in 0..mutants {
        loop {
            mutator.next(&mut frame);
            if can_run(&frame) {
                break;
            }
        }
        pair.run("a mutant", &frame);
        if (round + 1) % ROUND as u64 == 0 {
            pair.settle();
        }
    }
    pair.settle();
    let rate = mutants as f64 / begin.elapsed().as_secs_f64();
    let pushed = pair.pushed - pushed;
    println!(
        "NOTE {mutants} frames in the kernel ({hook:?}, {role:?}, direction {direction}) as on the \
         host, {pushed} of them records, {rate:.0} a second; {} seeds are too short for a test run",
        short.len()
    );
    assert!(pushed > mutants / 50, "only {pushed} records");
}

/// A test run takes no frame without payload, and on newer kernels none that is shorter than the IP
/// header which its type promises.
fn can_run(frame: &[u8]) -> bool {
    let least = match frame.get(12..14) {
        Some([0x08, 0x00]) => 14 + 20,
        Some([0x86, 0xdd]) => 14 + 40,
        _ => 15,
    };
    frame.len() >= least
}

/// The kernel half, and what the host expects of it.
struct Pair {
    kernel: Kernel,
    ring: RecordRing,
    _runtime: tokio::runtime::Runtime,
    hook: Hook,
    role: u8,
    direction: u8,
    slot: PortSlot,
    expected: Vec<(Vec<u8>, Record)>,
    counted: Counted,
    pushed: u64,
}

/// What becomes of frames that are no record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    dhcp: u64,
    records: u64,
    truncated: u64,
    not_dhcp: u64,
    ambiguous: u64,
    rogue: u64,
    unasked: u64,
}

impl Pair {
    fn new(hook: Hook, role: Role, direction: u8) -> Self {
        let mut kernel = load(hook);
        let runtime = runtime();
        let ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&port("lo", role), 0, 0).unwrap();
        let role = match role {
            Role::Vm => ROLE_VM,
            Role::Uplink => ROLE_UPLINK,
            Role::Aside => ROLE_ASIDE,
        };
        let mut pair = Self {
            kernel,
            ring,
            _runtime: runtime,
            hook,
            role,
            direction: DIRECTION_FROM_PORT,
            slot: PortSlot::new_zeroed(),
            expected: Vec::new(),
            counted: Counted::default(),
            pushed: 0,
        };
        if direction == DIRECTION_TO_PORT {
            // Only the answer to a question is a record.
            pair.run("the question", &Builder::selecting().build());
            assert!(pair.slot.asked(XID));
            pair.direction = direction;
        }
        pair
    }

    fn run(&mut self, name: &str, frame: &[u8]) {
        let _shown = Shown(name, frame);
        let program = match self.direction {
            DIRECTION_TO_PORT => "vm_egress",
            _ => "vm_ingress",
        };
        let (verdict, next) = match self.hook {
            Hook::Tc | Hook::Clsact => (run_tc(&self.kernel, program, frame), NEXT),
            Hook::Xdp => (run_xdp(&self.kernel, frame), XDP_PASS),
        };
        assert_eq!(verdict, next, "{name} is not handed on");
        self.expect(frame);
    }

    /// The kernel half's `dhcp()`, without the kernel.
    fn expect(&mut self, frame: &[u8]) {
        let (outcome, record) = classify_frame(frame, Tag::NONE);
        let counted = &mut self.counted;
        match outcome {
            Outcome::Other => return,
            Outcome::Truncated => return counted.truncated += 1,
            Outcome::NotDhcp => return counted.not_dhcp += 1,
            Outcome::Message => counted.dhcp += 1,
        }
        counted.ambiguous += u64::from(record.anomalies != 0);
        match interest(self.role, self.direction, &record) {
            Interest::Nobody => return,
            Interest::Push => {}
            Interest::PushAndRemember => self.slot.remember(record.xid),
            Interest::PushIfAsked => {
                if !self.slot.asked(record.xid) {
                    return counted.unasked += 1;
                }
            }
            Interest::Rogue => counted.rogue += 1,
        }
        counted.records += 1;
        let record = Record {
            ifindex: LO,
            direction: self.direction,
            role: self.role,
            ..record
        };
        self.expected.push((frame.to_vec(), record));
    }

    /// Compares what the kernel half said with what was expected.
    fn settle(&mut self) {
        let mut expected = std::mem::take(&mut self.expected).into_iter();
        loop {
            let records = self.ring.take_now();
            if records.is_empty() {
                break;
            }
            for record in records {
                assert_ne!(record.seen_ns, 0);
                let record = Record {
                    seen_ns: 0,
                    ..record
                };
                let (frame, host) = expected.next().expect("a record of no frame");
                let _shown = Shown("the first that differs", &frame);
                assert_eq!(record, host);
                self.pushed += 1;
            }
        }
        if let Some((frame, _)) = expected.next() {
            let _shown = Shown("the first that is missed", &frame);
            panic!("no record");
        }
        let counters = self.kernel.counters().unwrap();
        let counted = Counted {
            dhcp: counters["dhcp"],
            records: counters["records"],
            truncated: counters["truncated"],
            not_dhcp: counters["not_dhcp"],
            ambiguous: counters["ambiguous"],
            rogue: counters["rogue_server"],
            unasked: counters["unasked"],
        };
        assert_eq!(counted, self.counted, "{counters:?}");
        assert_eq!(counters["ring_full"] + counters["rate_limited"], 0);
    }
}
