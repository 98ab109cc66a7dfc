//! A world of a test's own: a thread with private namespaces, which end with it however it ends.

use std::{path::PathBuf, process::Command, thread, time::Duration};

use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use dhcp_reclaim_agent::{
    core::{Port, Role},
    kernel::{AttachedHook, Hook, Kernel, KernelError, LoadOptions, RecordRing},
};
use dhcp_reclaim_ebpf::abi::Record;
use dhcp_reclaim_tests::{boot::kernel::has_tcx, clock::Deadline};
use nix::{
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};

pub const SEGMENT: u32 = 7;
/// Test runs happen on `lo`, whose index is 1 in every namespace.
pub const LO: u32 = 1;
const BPFFS: &str = "/run/drk-bpffs";

/// Runs a test in network and mount namespaces of its own, with a BPF file system.
pub fn alone(test: impl FnOnce() + Send + 'static) {
    if !geteuid().is_root() {
        let test = thread::current();
        println!("SKIP {}: needs root", test.name().unwrap_or_default());
        return;
    }
    let world = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        std::fs::create_dir(BPFFS).unwrap();
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none).unwrap();
        ip("link set lo up");
        test();
    });
    if let Err(panic) = world.join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn options(hook: Hook) -> LoadOptions {
    LoadOptions {
        bpffs: PathBuf::from(BPFFS),
        hook,
        ..LoadOptions::default()
    }
}

/// What [`Hook::Tc`] comes to on this kernel.
pub fn tc_hook() -> AttachedHook {
    match has_tcx().unwrap() {
        true => AttachedHook::Tcx,
        false => AttachedHook::Clsact,
    }
}

#[track_caller]
pub fn load(hook: Hook) -> Kernel {
    load_with(&options(hook))
}

/// A process that another test's thread has just forked holds a copy of what was open before, and with
/// it the lock of a kernel half that is gone, until it executes something.
#[track_caller]
pub fn load_with(options: &LoadOptions) -> Kernel {
    let deadline = Deadline::after(Duration::from_secs(20));
    loop {
        match Kernel::load(options) {
            Err(KernelError::Occupied { .. }) if !deadline.passed() => {
                thread::sleep(Duration::from_millis(1));
            }
            loaded => return loaded.unwrap_or_else(|error| panic!("{error:?}")),
        }
    }
}

/// `ip(8)` with these words.
#[track_caller]
pub fn ip(words: &str) {
    let status = Command::new("ip")
        .args(words.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "ip {words}");
}

pub fn port(name: &str, role: Role) -> Port {
    let ifindex = if_nametoindex(name).unwrap();
    Port {
        ifindex,
        name: name.to_owned(),
        segment: SEGMENT,
        role,
    }
}

/// A veth pair: the port `vm0`, and the VM's end `guest0`.
pub fn vm_port() -> (Port, u32) {
    // Quiet ends: no neighbour discovery of the kernel's own.
    ip("link add vm0 type veth peer name guest0");
    for name in ["vm0", "guest0"] {
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        ip(&format!("link set {name} up"));
    }
    (port("vm0", Role::Vm), if_nametoindex("guest0").unwrap())
}

/// Needs a runtime, as the agent's loop does.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// `n` records, or what came within two seconds.
pub fn records(runtime: &tokio::runtime::Runtime, ring: &mut RecordRing, n: usize) -> Vec<Record> {
    let mut all = Vec::new();
    while all.len() < n {
        let batch = runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(2), ring.next_batch()).await
        });
        match batch {
            Ok(batch) => all.extend(batch.unwrap()),
            Err(_) => break,
        }
    }
    all
}

/// Runs a TC program over a frame, and returns its verdict.
#[track_caller]
pub fn run_tc(kernel: &Kernel, name: &str, frame: &[u8]) -> u32 {
    let program: &SchedClassifier = kernel.ebpf().program(name).unwrap().try_into().unwrap();
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    program.test_run(options).unwrap().return_value
}

/// Runs `xdp_ingress` over a frame, and returns its verdict.
#[track_caller]
pub fn run_xdp(kernel: &Kernel, frame: &[u8]) -> u32 {
    let program: &Xdp = kernel
        .ebpf()
        .program("xdp_ingress")
        .unwrap()
        .try_into()
        .unwrap();
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    program.test_run(options).unwrap().return_value
}
