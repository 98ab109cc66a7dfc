//! What a frame that is not DHCP costs: `cargo test -p dhcp-reclaim-tests --test cost -- --ignored
//! --nocapture`, as root, on a quiet machine.

#[expect(dead_code, reason = "shared with the other suite")]
mod world;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use dhcp_reclaim_agent::{
    core::{MacAddr, Role},
    kernel::{Hook, Kernel, watch_mac},
};
use dhcp_reclaim_ebpf::wire::vectors::{Builder, CLIENT_MAC, arp, tcp};
use world::{SEGMENT, alone, load, port};

const ROUNDS: usize = 31;
const REPEAT: u32 = 200_000;

#[test]
#[ignore = "a measurement"]
fn what_a_frame_costs() {
    alone(|| {
        let mut kernel = load(Hook::Tc);
        let lo = port("lo", Role::Vm);
        kernel.watch(&lo, 0, 0).unwrap();
        let dns = Builder::selecting()
            .with(|b| b.destination_port = 53)
            .build();
        println!(
            "ns a frame over an empty program: median of {ROUNDS} paired differences [quartiles]"
        );
        show(&kernel, "empty program against itself", "baseline", &tcp());
        show(&kernel, "TCP from a VM", "vm_ingress", &tcp());
        show(&kernel, "TCP to a VM", "vm_egress", &tcp());
        show(&kernel, "UDP from a VM, not DHCP", "vm_ingress", &dns);
        show(
            &kernel,
            "ARP of 42 bytes from a VM",
            "vm_ingress",
            &arp(CLIENT_MAC, [192, 0, 2, 50]),
        );
        kernel.set_exact(lo.ifindex, true);
        show(
            &kernel,
            "TCP from a VM, a check due, not watched",
            "vm_ingress",
            &tcp(),
        );
        kernel
            .arm(&watch_mac(SEGMENT, 0, MacAddr(CLIENT_MAC)))
            .unwrap();
        show(
            &kernel,
            "TCP from a VM, a check due, MAC watched",
            "vm_ingress",
            &tcp(),
        );
        for name in ["vm_ingress", "vm_egress", "emit"] {
            let info = program(&kernel, name).info().unwrap();
            println!(
                "{name}: {:?} instructions verified",
                info.verified_instruction_count()
            );
        }
    });
}

fn show(kernel: &Kernel, name: &str, program: &str, frame: &[u8]) {
    let [low, middle, high] = difference(kernel, program, frame);
    println!("{name:<44} {middle:+6.1} [{low:+.1}, {high:+.1}]");
}

/// Base, program, base: the program against the mean of its neighbours.
fn difference(kernel: &Kernel, name: &str, frame: &[u8]) -> [f64; 3] {
    let mut differences: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let before = run(kernel, "baseline", frame);
            let there = run(kernel, name, frame);
            let after = run(kernel, "baseline", frame);
            there - f64::midpoint(before, after)
        })
        .collect();
    differences.sort_by(f64::total_cmp);
    [ROUNDS / 4, ROUNDS / 2, ROUNDS * 3 / 4].map(|at| differences[at])
}

/// The kernel reports whole nanoseconds a run: of one long run the total would say no more.
fn run(kernel: &Kernel, name: &str, frame: &[u8]) -> f64 {
    let options = TestRunOptions {
        data_in: Some(frame),
        repeat: REPEAT,
        ..TestRunOptions::new()
    };
    program(kernel, name)
        .test_run(options)
        .unwrap()
        .duration
        .as_nanos() as f64
}

fn program<'a>(kernel: &'a Kernel, name: &str) -> &'a SchedClassifier {
    kernel.ebpf().program(name).unwrap().try_into().unwrap()
}
