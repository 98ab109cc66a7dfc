//! The kernel half in the kernel: as root, each test in namespaces of its own.

mod world;

use std::{collections::BTreeSet, net::UdpSocket, time::Duration};

use aya::programs::{SchedClassifier, TcAttachType, TestRun, TestRunOptions, tc};
use dhcp_reclaim_agent::{
    core::{MacAddr, Port, Role},
    emit::{PacketSocket, PrivateLink},
    kernel::{
        AttachedHook, Expedite, Hook, Kernel, KernelError, LoadOptions, RecordRing, message,
        watch_ip, watch_mac,
    },
};
use dhcp_reclaim_ebpf::{
    abi::{
        ABI_VERSION, DIRECTION_FROM_PORT, DIRECTION_TO_PORT, EMIT_EGRESS, EMIT_INGRESS, EmitOrder,
        PORT_SLOTS, ROLE_ASIDE, ROLE_VM, Record, VERDICT_NONE, VERDICT_SENT, VERDICT_UNWATCHED,
        VERDICT_VETOED, port_slots,
    },
    wire::{
        ACK, RELEASE, REQUEST,
        vectors::{self, Builder, CLIENT_IP, CLIENT_MAC, SERVER_IP},
    },
};
use dhcp_reclaim_tests::clock::Deadline;
use world::{
    LO, SEGMENT, alone, ip, load, load_with, options, port, records, run_tc, run_xdp, runtime,
    tc_hook, vm_port,
};

/// Programs of other agents, XDP among them, see what we see: nothing is changed.
#[test]
fn frames_pass_unchanged() {
    alone(|| {
        let mut kernel = load(Hook::Tc);
        kernel.watch(&port("lo", Role::Vm), 0, 0).unwrap();
        let frame = Builder::selecting().build();
        let mut out = vec![0; frame.len()];
        let program: &SchedClassifier = kernel
            .ebpf()
            .program("vm_ingress")
            .unwrap()
            .try_into()
            .unwrap();
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(&frame),
                data_out: Some(&mut out),
                ..TestRunOptions::new()
            })
            .unwrap();
        assert_eq!((result.data_size_out as usize, out), (frame.len(), frame));
    });
}

/// It is set while something is done, and then as it was. The kernel of a test machine may lack it.
#[test]
fn the_kernel_hurries_for_as_long_as_it_is_told_to() {
    const KNOB: &str = "/sys/kernel/rcu_expedited";

    let read = || std::fs::read_to_string(KNOB);
    let Ok(before) = read() else {
        println!("SKIP the_kernel_hurries_for_as_long_as_it_is_told_to: there is no {KNOB}");
        return;
    };
    let hurry = Expedite::open().unwrap();
    hurry.during(|| assert_eq!(read().unwrap().trim(), "1"));
    assert_eq!(read().unwrap(), before);
    Expedite::default().during(|| assert_eq!(read().unwrap(), before));
}

#[test]
fn the_default_hears_the_vm_and_the_answer() {
    alone(|| hear(Hook::Tc, tc_hook()));
}

#[test]
fn clsact_hears_the_vm_and_the_answer() {
    alone(|| hear(Hook::Clsact, AttachedHook::Clsact));
}

#[test]
fn xdp_hears_the_vm() {
    alone(|| hear(Hook::Xdp, AttachedHook::XdpNative));
}

fn hear(hook: Hook, expected: AttachedHook) {
    let (vm, guest) = vm_port();
    let mut kernel = load(hook);
    let runtime = runtime();
    let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
    assert_eq!(kernel.watch(&vm, 0, 0).unwrap(), expected);
    let socket = PacketSocket::open().unwrap();

    // Nobody asked yet: broadcast answers to others do not count.
    socket
        .send_on(vm.ifindex, &Builder::server(ACK).build())
        .unwrap();
    let tagged = Builder::selecting().with(|b| b.tags.push((0x8100, 100)));
    socket.send_on(guest, &tagged.build()).unwrap();
    let heard = records(&runtime, &mut ring, 1);
    let [request] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert_eq!(
        (request.direction, request.ifindex),
        (DIRECTION_FROM_PORT, vm.ifindex)
    );
    let request = message(request).unwrap();
    assert_eq!((request.vlan, request.chaddr), (100, MacAddr(CLIENT_MAC)));
    assert_eq!(request.requested_ip, Some(CLIENT_IP.into()));
    assert!(!request.ambiguous, "{request:?}");

    if hook == Hook::Xdp {
        kernel.unwatch(vm.ifindex);
        return;
    }
    socket
        .send_on(vm.ifindex, &Builder::server(ACK).build())
        .unwrap();
    let heard = records(&runtime, &mut ring, 1);
    let [ack] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert_eq!((ack.direction, ack.role), (DIRECTION_TO_PORT, ROLE_VM));
    let ack = message(ack).unwrap();
    assert_eq!(
        (ack.yiaddr, ack.lease_secs),
        (Some(CLIENT_IP.into()), Some(3600))
    );
    assert_eq!(kernel.counters().unwrap()["unasked"], 1);

    // Watched once more: nothing is heard twice. Then not at all.
    assert_eq!(kernel.watch(&vm, 0, 0).unwrap(), expected);
    socket
        .send_on(guest, &Builder::selecting().build())
        .unwrap();
    assert_eq!(records(&runtime, &mut ring, 1).len(), 1);
    kernel.unwatch(vm.ifindex);
    socket
        .send_on(guest, &Builder::selecting().build())
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(ring.take_now(), []);

    // A port that vanishes under us is no error, and neither is its index.
    kernel.watch(&vm, 0, 0).unwrap();
    ip("link del vm0");
    kernel.unwatch(vm.ifindex);
    assert!(matches!(
        kernel.watch(&vm, 0, 0),
        Err(KernelError::PortGone { .. })
    ));
    assert_eq!(kernel.port_epoch(vm.ifindex), None);
}

/// Filters of a clsact are replaced, not taken away and set anew: each frame is heard meanwhile.
#[test]
fn clsact_misses_nothing_while_its_filters_are_replaced() {
    const FRAMES: u32 = 2000;
    const XID_AT: usize = 14 + 20 + 8 + 4;

    alone(|| {
        let (vm, guest) = vm_port();
        let mut kernel = load(Hook::Clsact);
        let runtime = runtime();
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&vm, 0, 0).unwrap();
        let mut frame = Builder::selecting().build();
        let heard: BTreeSet<u32> = std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let socket = PacketSocket::open().unwrap();
                for xid in 0..FRAMES {
                    frame[XID_AT..XID_AT + 4].copy_from_slice(&xid.to_be_bytes());
                    socket.send_on(guest, &frame).unwrap();
                }
            });
            let mut replaced = 0;
            while !sender.is_finished() || replaced == 0 {
                kernel.watch(&vm, 0, 0).unwrap();
                replaced += 1;
            }
            sender.join().unwrap();
            let mut heard = BTreeSet::new();
            while !heard.contains(&(FRAMES - 1)) {
                let batch = records(&runtime, &mut ring, 1);
                assert_ne!(batch, [], "{} of {FRAMES} heard", heard.len());
                heard.extend(batch.iter().map(|record| u32::from_be_bytes(record.xid)));
            }
            heard
        });
        let missed: Vec<u32> = (0..FRAMES).filter(|xid| !heard.contains(xid)).collect();
        assert!(missed.is_empty(), "{missed:?}");
    });
}

/// Others share a clsact, and clear it.
#[test]
fn a_filter_that_others_took_away_is_missed() {
    alone(|| {
        let (vm, _) = vm_port();
        let mut kernel = load(Hook::Clsact);
        for (way, name) in [
            (TcAttachType::Ingress, "vm_ingress"),
            (TcAttachType::Egress, "vm_egress"),
        ] {
            kernel.watch(&vm, 0, 0).unwrap();
            assert!(kernel.in_place(vm.ifindex));
            tc::qdisc_detach_program("vm0", way, name).unwrap();
            assert!(!kernel.in_place(vm.ifindex), "{name}");
            // There was one, although it has been watched twice.
            assert!(tc::qdisc_detach_program("vm0", way, name).is_err());
        }
        kernel.watch(&vm, 0, 0).unwrap();
        assert!(kernel.in_place(vm.ifindex));
    });
}

#[test]
fn sightings_are_coarse_until_a_check_is_due() {
    alone(|| {
        let (vm, guest) = vm_port();
        let mut kernel = load(Hook::Tc);
        kernel.watch(&vm, 0, 0).unwrap();
        let socket = PacketSocket::open().unwrap();
        let (ip, mac) = keys();
        kernel.arm(&ip).unwrap();
        kernel.arm(&mac).unwrap();
        let arp = vectors::arp(CLIENT_MAC, CLIENT_IP);

        assert_eq!(kernel.port_epoch(vm.ifindex), None);
        let epoch = kernel.advance_epoch().unwrap();
        socket.send_on(guest, &arp).unwrap();
        settle();
        assert_eq!(kernel.port_epoch(vm.ifindex), Some(epoch));
        assert_eq!(kernel.watched(&ip).unwrap().unwrap().latest_ns(), 0);

        kernel.set_exact(vm.ifindex, true);
        socket.send_on(guest, &arp).unwrap();
        settle();
        let seen = kernel.watched(&ip).unwrap().unwrap();
        assert!(seen.seen_at(vm.ifindex).is_some(), "{seen:?}");
        assert_eq!(
            (seen.seen_elsewhere(vm.ifindex), seen.mac),
            (None, CLIENT_MAC)
        );
        assert!(
            kernel
                .watched(&mac)
                .unwrap()
                .unwrap()
                .seen_at(vm.ifindex)
                .is_some()
        );

        // Armed again, nothing is forgotten; disarmed, all.
        kernel.arm(&ip).unwrap();
        assert_eq!(kernel.watched(&ip).unwrap(), Some(seen));
        kernel.disarm(&ip).unwrap();
        kernel.disarm(&ip).unwrap();
        assert_eq!(kernel.watched(&ip).unwrap(), None);
        assert_eq!(kernel.armed().unwrap(), [mac]);

        // Another VLAN is another address.
        let before = kernel.watched(&mac).unwrap();
        let tagged = Builder::selecting()
            .with(|b| b.tags.push((0x8100, 9)))
            .build();
        socket.send_on(guest, &tagged).unwrap();
        settle();
        assert_eq!(kernel.watched(&mac).unwrap(), before);
    });
}

#[test]
fn a_frame_after_the_decision_vetoes_the_release() {
    alone(|| veto(EMIT_INGRESS));
}

#[test]
fn a_release_reaches_a_server_elsewhere() {
    alone(|| veto(EMIT_EGRESS));
}

/// The server is a socket: on the bridge's own address, or behind another port of the bridge.
fn veto(direction: u8) {
    let (vm, guest) = vm_port();
    ip("link add br0 type bridge");
    ip("link set br0 up");
    ip("link set vm0 master br0");
    let device = if direction == EMIT_INGRESS {
        "br0"
    } else {
        ip("link add srv0 type veth peer name srv1");
        ip("link set srv0 up master br0");
        ip("link set srv1 up");
        "srv1"
    };
    ip(&format!("address add 192.0.2.1/24 dev {device}"));
    let server_mac: MacAddr = std::fs::read_to_string(format!("/sys/class/net/{device}/address"))
        .or_else(|_| link_address(device))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let server = UdpSocket::bind("0.0.0.0:67").unwrap();
    server
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();

    let runtime = runtime();
    let mut kernel = load(Hook::Tc);
    let link = runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        // Twice: the second takes the place of the first, as after a crash.
        std::mem::forget(PrivateLink::create(&handle).await.unwrap());
        PrivateLink::create(&handle).await.unwrap()
    });
    assert_eq!(kernel.attach_emit(link.ifindex()).unwrap(), tc_hook());
    kernel.watch(&vm, 0, 0).unwrap();
    kernel.set_exact(vm.ifindex, true);
    let socket = PacketSocket::open().unwrap();
    let (ip_key, mac_key) = keys();
    let order = |silent_since_ns| EmitOrder {
        silent_since_ns,
        ip: ip_key,
        mac: mac_key,
        ifindex: port("br0", Role::Vm).ifindex,
        direction,
        verdict: VERDICT_NONE,
        vlan: [0; 2],
    };
    let xid = u32::from_be_bytes(vectors::XID);
    let release = release(server_mac.0);
    let mut buffer = [0; 600];

    // Without an order, without a watch: nothing leaves.
    link.send_release(&release).unwrap();
    assert_eq!(kernel.verdict(xid).unwrap(), VERDICT_NONE);
    kernel.order(xid, &order(1)).unwrap();
    link.send_release(&release).unwrap();
    assert_eq!(kernel.verdict(xid).unwrap(), VERDICT_UNWATCHED);

    kernel.arm(&ip_key).unwrap();
    kernel.arm(&mac_key).unwrap();
    kernel.order(xid, &order(1)).unwrap();
    socket
        .send_on(guest, &vectors::arp(CLIENT_MAC, CLIENT_IP))
        .unwrap();
    settle();
    link.send_release(&release).unwrap();
    assert_eq!(kernel.verdict(xid).unwrap(), VERDICT_VETOED);
    assert_eq!(
        kernel.verdict(xid).unwrap(),
        VERDICT_VETOED,
        "still there, for whoever asks"
    );
    assert_eq!(kernel.orders().unwrap()[&xid].verdict, VERDICT_VETOED);
    kernel.forget_order(xid).unwrap();
    kernel.forget_order(xid).unwrap();
    assert_eq!(kernel.verdict(xid).unwrap(), VERDICT_NONE);
    assert!(
        server.recv(&mut buffer).is_err(),
        "a vetoed RELEASE arrived"
    );

    let seen = [ip_key, mac_key].map(|key| kernel.watched(&key).unwrap().unwrap().latest_ns());
    let now = seen[0].max(seen[1]);
    kernel.order(xid, &order(now)).unwrap();
    link.send_release(&release).unwrap();
    assert_eq!(kernel.verdict(xid).unwrap(), VERDICT_SENT);
    let (len, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(from.to_string(), "192.0.2.50:68");
    assert_eq!(buffer[..len], release[42..]);

    if direction == EMIT_EGRESS {
        // This kernel may lack 802.1Q devices: our own classifier tells the tag on arrival.
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&port("srv1", Role::Vm), 0, 0).unwrap();
        let tagged = EmitOrder {
            vlan: [0, 100],
            ..order(now)
        };
        kernel.order(xid, &tagged).unwrap();
        link.send_release(&release).unwrap();
        assert_eq!(kernel.verdict(xid).unwrap(), VERDICT_SENT);
        let heard = records(&runtime, &mut ring, 1);
        let [record] = &heard[..] else {
            panic!("{heard:?}")
        };
        assert_eq!((record.message_type, record.vlan), (RELEASE, [0, 100]));
        assert_eq!(record.anomalies, 0);
    }

    let sent = if direction == EMIT_EGRESS { 2 } else { 1 };
    let counters = kernel.counters().unwrap();
    assert_eq!(
        (counters["emit_sent"], counters["emit_vetoed"]),
        (sent, 2),
        "{counters:?}"
    );
    drop(link);
    assert!(
        nix::net::if_::if_nametoindex("dreclaim0").is_err(),
        "the link stays"
    );
}

#[test]
fn pins_outlive_the_agent() {
    alone(|| outlive(Hook::Tc, tc_hook()));
}

/// Filters have no pins, and are found again all the same.
#[test]
fn filters_outlive_the_agent() {
    alone(|| outlive(Hook::Clsact, AttachedHook::Clsact));
}

fn outlive(hook: Hook, expected: AttachedHook) {
    let (vm, guest) = vm_port();
    let socket = PacketSocket::open().unwrap();
    let (ip, mac) = keys();
    let runtime = runtime();
    let mut first = load(hook);
    let error = Kernel::load(&options(hook)).err().unwrap().to_string();
    let occupied = format!("another agent (pid {}) is already here", std::process::id());
    assert!(error.starts_with(&occupied), "{error}");
    first.watch(&vm, 0, 0).unwrap();
    first.set_exact(vm.ifindex, true);
    let epoch = first.advance_epoch().unwrap();
    first.arm(&mac).unwrap();
    first.arm(&ip).unwrap();
    drop(first);

    // Nobody is there, and yet it is noted.
    socket
        .send_on(guest, &vectors::arp(CLIENT_MAC, CLIENT_IP))
        .unwrap();
    socket
        .send_on(guest, &Builder::selecting().build())
        .unwrap();
    settle();

    let mut second = load(hook);
    let mut ring = runtime.block_on(async { second.ring() }).unwrap();
    assert_eq!(
        records(&runtime, &mut ring, 1).len(),
        1,
        "the record waited"
    );
    assert_eq!(second.port_epoch(vm.ifindex), Some(epoch));
    assert!(
        second
            .watched(&mac)
            .unwrap()
            .unwrap()
            .seen_at(vm.ifindex)
            .is_some()
    );
    let slot = second.port_slot(vm.ifindex).unwrap();
    assert!(slot.asked(vectors::XID) && slot.exact == 1, "{slot:?}");
    assert_eq!(second.advance_epoch().unwrap(), epoch + 1);

    // Taken over, not attached twice; the answer to the REQUEST of before is heard.
    assert_eq!(second.watch(&vm, 0, 0).unwrap(), expected);
    socket
        .send_on(vm.ifindex, &Builder::server(ACK).build())
        .unwrap();
    assert_eq!(records(&runtime, &mut ring, 1).len(), 1);
    settle();
    assert_eq!(ring.take_now(), []);
    assert!(second.forget_unwatched().unwrap().is_empty());
    drop((second, ring));

    // A third that does not want the port takes the programs off.
    let mut third = load(hook);
    assert_eq!(third.forget_unwatched().unwrap(), [vm.ifindex]);
    assert_eq!(third.port_slot(vm.ifindex), None);
    let before = third.counters().unwrap();
    socket
        .send_on(guest, &Builder::selecting().build())
        .unwrap();
    settle();
    assert_eq!(third.counters().unwrap(), before);

    // A clean stop leaves nothing; another size of the ring is another map.
    third.unpin_all().unwrap();
    let LoadOptions { bpffs, .. } = options(hook);
    assert!(!bpffs.join("dhcp-reclaim").exists());
    drop(load(hook));
    load_with(&LoadOptions {
        ring_bytes: 4096,
        ..options(hook)
    });
}

/// An agent with another layout of its maps starts from nothing, and its predecessor's programs are
/// off the ports before its own are on.
#[test]
fn pins_of_another_version_are_replaced() {
    alone(|| {
        let (vm, guest) = vm_port();
        let socket = PacketSocket::open().unwrap();
        let runtime = runtime();
        let mut old = load(Hook::Tc);
        old.watch(&vm, 0, 0).unwrap();
        drop(old);
        let LoadOptions { bpffs, .. } = options(Hook::Tc);
        let top = bpffs.join("dhcp-reclaim");
        let current = top.join(format!("v{ABI_VERSION}"));
        let other = top.join(format!("v{}", ABI_VERSION + 1));
        std::fs::rename(&current, &other).unwrap();
        socket
            .send_on(guest, &Builder::selecting().build())
            .unwrap();
        settle();

        let mut new = load(Hook::Tc);
        assert!(!other.exists() && current.exists());
        let mut ring = runtime.block_on(async { new.ring() }).unwrap();
        assert_eq!(ring.take_now(), [], "the other's records are not ours");
        assert_eq!(new.port_slot(vm.ifindex), None);
        let sees = |ring: &mut RecordRing| {
            socket
                .send_on(guest, &Builder::selecting().build())
                .unwrap();
            settle();
            ring.take_now().len()
        };
        assert_eq!(sees(&mut ring), 0, "nobody listens any more");
        assert_eq!(new.watch(&vm, 0, 0).unwrap(), tc_hook());
        assert_eq!(sees(&mut ring), 1);
        new.unpin_all().unwrap();
        assert!(!top.exists());
    });
}

/// A record stays in the ring until it is consumed, and then it is not read again.
#[test]
fn a_record_that_was_not_consumed_is_read_again() {
    alone(|| {
        let (vm, guest) = vm_port();
        let socket = PacketSocket::open().unwrap();
        let runtime = runtime();
        let frame = Builder::selecting().build();
        let at = frame.windows(4).position(|bytes| bytes == vectors::XID);
        let at = at.unwrap();
        let send = |xid: u32| {
            let mut frame = frame.clone();
            frame[at..at + 4].copy_from_slice(&xid.to_be_bytes());
            // Without a checksum (RFC 768): 14 of Ethernet, 20 of IP, 6 into UDP.
            frame[40..42].fill(0);
            socket.send_on(guest, &frame).unwrap();
        };
        let mut first = load(Hook::Tc);
        let mut ring = runtime.block_on(async { first.ring() }).unwrap();
        first.watch(&vm, 0, 0).unwrap();
        for xid in 1..=3 {
            send(xid);
        }
        settle();
        let xid = |record: Record| u32::from_be_bytes(record.xid);
        assert_eq!(ring.read().map(xid), Some(1));
        ring.consume();
        assert_eq!(ring.read().map(xid), Some(2));
        // Killed here.
        drop((first, ring));
        let mut second = load(Hook::Tc);
        let mut ring = runtime.block_on(async { second.ring() }).unwrap();
        send(4);
        settle();
        let rest: Vec<_> = ring.take_now().into_iter().map(xid).collect();
        assert_eq!(rest, [2, 3, 4]);
        // Round and round: the ring is smaller than what goes through it, and each is read once.
        for round in 0..200_u32 {
            for n in 0..10 {
                send(round * 10 + n);
            }
            let heard = records(&runtime, &mut ring, 10).into_iter().map(xid);
            let sent: Vec<_> = (round * 10..round * 10 + 10).collect();
            assert_eq!(heard.collect::<Vec<_>>(), sent);
        }
        second.unpin_all().unwrap();
    });
}

#[test]
fn a_port_may_say_only_so_much() {
    alone(|| {
        let mut kernel = load(Hook::Tc);
        let runtime = runtime();
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&port("lo", Role::Vm), 1, 3).unwrap();
        let frame = Builder::selecting().build();
        for _ in 0..10 {
            run_tc(&kernel, "vm_ingress", &frame);
        }
        assert_eq!(ring.take_now().len(), 3);
        let counters = kernel.counters().unwrap();
        assert_eq!(
            (counters["records"], counters["rate_limited"]),
            (3, 7),
            "{counters:?}"
        );
        assert_eq!(kernel.port_lost(LO), Some(7));
    });
}

#[test]
fn a_full_ring_keeps_room_for_the_server() {
    alone(|| {
        let mut kernel = load_with(&LoadOptions {
            ring_bytes: 4096,
            ..options(Hook::Tc)
        });
        let runtime = runtime();
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&port("lo", Role::Vm), 0, 0).unwrap();
        let request = Builder::selecting().build();
        for _ in 0..20 {
            run_tc(&kernel, "vm_ingress", &request);
        }
        // 360 bytes each; three quarters are full with the ninth.
        assert_eq!(kernel.counters().unwrap()["ring_full"], 11);
        for _ in 0..4 {
            run_tc(&kernel, "vm_egress", &Builder::server(ACK).build());
        }
        let records = ring.take_now();
        let answers = records
            .iter()
            .filter(|record| record.direction == DIRECTION_TO_PORT);
        assert_eq!((records.len(), answers.count()), (11, 2));
        assert_eq!(kernel.counters().unwrap()["ring_full"], 13);
        assert_eq!(kernel.port_lost(LO), Some(13));
    });
}

/// With the `debug!` lines the programs are others to the verifier.
#[test]
fn the_log_is_wired() {
    alone(|| {
        for hook in [Hook::Tc, Hook::Xdp] {
            let mut kernel = load_with(&LoadOptions {
                debug: true,
                ..options(hook)
            });
            kernel.watch(&port("lo", Role::Vm), 0, 0).unwrap();
            assert!(kernel.logger().is_some());
            let rogue = Builder::server(ACK).build();
            match hook {
                Hook::Tc | Hook::Clsact => run_tc(&kernel, "vm_ingress", &rogue),
                Hook::Xdp => run_xdp(&kernel, &rogue),
            };
            assert_eq!(kernel.counters().unwrap()["rogue_server"], 1);
            kernel.unpin_all().unwrap();
        }
    });
}

#[test]
fn a_slot_has_one_owner() {
    alone(|| {
        let mut kernel = load(Hook::Tc);
        kernel.watch(&port("lo", Role::Vm), 0, 0).unwrap();
        // Its first place is lo's, and each is heard by its own.
        let far = port_slots(LO)[0] + PORT_SLOTS;
        ip(&format!(
            "link add other index {far} type veth peer name peer0"
        ));
        for link in ["lo", "other", "peer0"] {
            ip(&format!("link set {link} up"));
        }
        let other = port("other", Role::Vm);
        kernel.watch(&other, 0, 0).unwrap();
        let epoch = kernel.advance_epoch().unwrap();
        let socket = PacketSocket::open().unwrap();
        let peer = port("peer0", Role::Vm).ifindex;
        socket.send_on(peer, &Builder::selecting().build()).unwrap();
        let deadline = Deadline::after(Duration::from_secs(5));
        while kernel.port_epoch(far) != Some(epoch) {
            assert!(!deadline.passed(), "not heard");
            std::thread::yield_now();
        }
        assert_ne!(kernel.port_epoch(LO), Some(epoch));
        // A third finds none, until one of the two is gone.
        let (los, others) = (port_slots(LO), port_slots(far));
        let mut indexes = (1..).map(|n| others[1] + n * PORT_SLOTS);
        let third = indexes.find(|it| port_slots(*it) == [others[1], los[0]]);
        ip(&format!(
            "link add third index {} type veth peer name peer1",
            third.unwrap()
        ));
        let third = port("third", Role::Vm);
        let Err(KernelError::SlotTaken { owner, .. }) = kernel.watch(&third, 0, 0) else {
            panic!("two owners");
        };
        assert_eq!(owner, far);
        kernel.unwatch(LO);
        kernel.watch(&third, 0, 0).unwrap();
    });
}

#[test]
fn an_uplink_is_heard_but_not_answered() {
    alone(|| {
        let (vm, guest) = vm_port();
        let uplink = Port {
            role: Role::Uplink,
            ..vm
        };
        let mut kernel = load(Hook::Tc);
        let runtime = runtime();
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&uplink, 0, 0).unwrap();
        let socket = PacketSocket::open().unwrap();
        socket
            .send_on(guest, &Builder::server(ACK).build())
            .unwrap();
        socket
            .send_on(guest, &Builder::client(REQUEST).build())
            .unwrap();
        socket
            .send_on(uplink.ifindex, &Builder::server(ACK).build())
            .unwrap();
        assert_eq!(records(&runtime, &mut ring, 2).len(), 2);
        settle();
        assert_eq!(ring.take_now(), []);
        assert_eq!(kernel.counters().unwrap()["rogue_server"], 0);
    });
}

/// No lease is learned there and no server believed, and its frames are signs of life.
#[test]
fn a_port_that_nobody_named_is_only_looked_at() {
    alone(|| {
        let (vm, guest) = vm_port();
        let aside = Port {
            role: Role::Aside,
            ..vm
        };
        let mut kernel = load(Hook::Tc);
        let runtime = runtime();
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&aside, 0, 0).unwrap();
        kernel.set_exact(aside.ifindex, true);
        let (_, mac) = keys();
        kernel.arm(&mac).unwrap();
        let socket = PacketSocket::open().unwrap();
        socket
            .send_on(guest, &Builder::selecting().build())
            .unwrap();
        socket
            .send_on(guest, &Builder::server(ACK).build())
            .unwrap();
        let heard = records(&runtime, &mut ring, 1);
        let [record] = &heard[..] else {
            panic!("{heard:?}")
        };
        assert_eq!((record.message_type, record.role), (ACK, ROLE_ASIDE));
        assert_eq!(kernel.counters().unwrap()["rogue_server"], 1);
        let seen = kernel.watched(&mac).unwrap().unwrap();
        assert!(seen.seen_at(aside.ifindex).is_some());
    });
}

fn keys() -> (
    dhcp_reclaim_ebpf::abi::WatchKey,
    dhcp_reclaim_ebpf::abi::WatchKey,
) {
    (
        watch_ip(SEGMENT, 0, CLIENT_IP.into()),
        watch_mac(SEGMENT, 0, MacAddr(CLIENT_MAC)),
    )
}

/// As the agent's `packet` builds it, in brief: with the IP checksum that a server's kernel asks for.
fn release(server_mac: [u8; 6]) -> Vec<u8> {
    let mut frame = Builder::client(RELEASE)
        .option(54, &SERVER_IP)
        .with(|b| {
            b.destination_mac = server_mac;
            b.source_ip = CLIENT_IP;
            b.destination_ip = SERVER_IP;
            b.ciaddr = CLIENT_IP;
        })
        .build();
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|half| u32::from(u16::from_be_bytes([half[0], half[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    frame
}

/// `/sys` may show another namespace's devices.
fn link_address(device: &str) -> std::io::Result<String> {
    let output = std::process::Command::new("ip")
        .args(["-o", "link", "show", device])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text
        .split_whitespace()
        .skip_while(|word| *word != "link/ether");
    words
        .nth(1)
        .map(str::to_owned)
        .ok_or(std::io::ErrorKind::NotFound.into())
}

/// veth hands frames on in a softirq.
fn settle() {
    std::thread::sleep(Duration::from_millis(30));
}
