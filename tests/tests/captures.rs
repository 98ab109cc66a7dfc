//! Whole lives of real clients, as they were on the wire: each frame is the record that another
//! parser wrote down next to it.
//!
//! `cargo test -p dhcp-reclaim-tests --test captures -- --ignored`, as root, makes the captures anew. It
//! needs the package tshark, and iPXE's needs qemu-system-x86 and ipxe-qemu.

#[expect(dead_code, reason = "shared with the other suites")]
mod world;

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_agent::{core::Role, kernel::Hook};
use dhcp_reclaim_ebpf::{
    abi::{
        DIRECTION_FROM_PORT, DIRECTION_TO_PORT, PRESENT_CLIENT_ID, PRESENT_LEASE_TIME,
        PRESENT_REBINDING_TIME, PRESENT_RELAY_AGENT, PRESENT_RENEWAL_TIME, PRESENT_REQUESTED_IP,
        PRESENT_SERVER_ID, Record,
    },
    wire::{Outcome, Tag, classify_frame},
};
use dhcp_reclaim_tests::{
    corpus::CAPTURES,
    fixture::{BRIDGE, Mac, vm_mac},
    lab_test,
    netns::NetNs,
    pcap,
    process::Process,
    sandbox::{DIR, find, run},
    server::{Place, Pool, ServerKind},
    vm::{Client, Vm},
    wire::{self, ACK, Capture, DECLINE, DISCOVER, Dhcp, Frame, NAK, OFFER, RELEASE, REQUEST},
    world::{PATIENCE, World},
};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use world::{LO, alone, load, port, run_tc, runtime};

/// For a client's T1, and for a machine without a hypervisor's help.
const LONG: Duration = Duration::from_secs(60);

/// How the names of captures begin.
const CLIENTS: [&str; 5] = ["udhcpc-", "dhclient-", "dhcpcd-", "networkd-", "ipxe-"];

/// What is written next to a capture.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Description {
    about: String,
    made_with: Vec<String>,
    records: Vec<String>,
}

#[test]
fn every_captured_frame_is_the_record_that_it_should_be() {
    for (name, frames, description) in captures() {
        assert_eq!(frames.len(), description.records.len(), "{name}");
        for (number, (frame, expected)) in frames.iter().zip(&description.records).enumerate() {
            let (outcome, record) = classify_frame(frame, Tag::NONE);
            assert_eq!(outcome, Outcome::Message, "{name}, frame {number}");
            assert_eq!(record.anomalies, 0, "{name}, frame {number}");
            let row = Row::of_record(&record).to_string();
            assert_eq!(row, *expected, "{name}, frame {number}");
        }
    }
}

#[test]
fn the_kernel_half_hears_every_captured_life() {
    alone(|| {
        let mut kernel = load(Hook::Tc);
        let runtime = runtime();
        let mut ring = runtime.block_on(async { kernel.ring() }).unwrap();
        kernel.watch(&port("lo", Role::Vm), 0, 0).unwrap();
        for (name, frames, description) in captures() {
            for frame in &frames {
                let program = if from_vm(frame) {
                    "vm_ingress"
                } else {
                    "vm_egress"
                };
                run_tc(&kernel, program, frame);
            }
            let heard: Vec<_> = ring.take_now();
            for record in &heard {
                let direction = match Row::of_record(record).from_vm {
                    true => DIRECTION_FROM_PORT,
                    false => DIRECTION_TO_PORT,
                };
                assert_eq!(
                    (record.ifindex, record.direction),
                    (LO, direction),
                    "{name}"
                );
            }
            let heard: Vec<_> = heard
                .iter()
                .map(|r| Row::of_record(r).to_string())
                .collect();
            // Nobody is told of a question that takes no lease, nor of its answer.
            let asks = ["vm DISCOVER ", "server OFFER "];
            let expected = description.records.into_iter();
            let expected = expected.filter(|row| !asks.iter().any(|ask| row.starts_with(ask)));
            assert_eq!(heard, expected.collect::<Vec<_>>(), "{name}");
        }
    });
}

fn captures() -> Vec<(String, Vec<Vec<u8>>, Description)> {
    let mut captures = Vec::new();
    for file in fs::read_dir(CAPTURES).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let frames = pcap::read(&path.with_extension("pcap")).unwrap();
        let description = toml::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        captures.push((name, frames, description));
    }
    assert!(captures.len() >= 7, "{} captures", captures.len());
    for client in CLIENTS {
        let some = captures.iter().any(|(name, ..)| name.starts_with(client));
        assert!(some, "no capture of {client}");
    }
    let files = fs::read_dir(CAPTURES).unwrap().count();
    assert_eq!(
        files,
        2 * captures.len(),
        "a capture without a description, in {CAPTURES}"
    );
    captures
}

fn from_vm(frame: &[u8]) -> bool {
    frame.get(6..12) == Some(&vm_mac(1).0)
}

/// What of a message a record has, one line each.
struct Row {
    from_vm: bool,
    kind: u8,
    xid: u32,
    chaddr: Mac,
    addresses: [(&'static str, Ipv4Addr); 4],
    options: BTreeMap<u8, Vec<u8>>,
}

impl Row {
    fn of_record(record: &Record) -> Self {
        let id = &record.client_id[..usize::from(record.client_id_len)];
        let options = [
            (PRESENT_REQUESTED_IP, 50, &record.requested_ip[..]),
            (PRESENT_LEASE_TIME, 51, &record.lease_time),
            (PRESENT_SERVER_ID, 54, &record.server_id),
            (PRESENT_RENEWAL_TIME, 58, &record.renewal_time),
            (PRESENT_REBINDING_TIME, 59, &record.rebinding_time),
            (PRESENT_CLIENT_ID, 61, id),
            (PRESENT_RELAY_AGENT, 82, &[]),
        ];
        let there = options
            .into_iter()
            .filter(|(bit, ..)| record.present & bit != 0);
        Self {
            from_vm: Mac(record.source_mac) == vm_mac(1),
            kind: record.message_type,
            xid: u32::from_be_bytes(record.xid),
            chaddr: Mac(record.chaddr),
            addresses: [
                ("from", record.source_ip.into()),
                ("to", record.destination_ip.into()),
                ("ciaddr", record.ciaddr.into()),
                ("yiaddr", record.yiaddr.into()),
            ],
            options: there
                .map(|(_, code, value)| (code, value.to_vec()))
                .collect(),
        }
    }

    /// As the lab's own parser reads it, which knows nothing of the classifier.
    fn of_dhcp(dhcp: &Dhcp) -> Self {
        let recorded = [50, 51, 54, 58, 59, 61];
        let options = dhcp
            .options
            .iter()
            .filter(|(code, _)| recorded.contains(code));
        Self {
            from_vm: dhcp.from_mac == vm_mac(1),
            kind: dhcp.kind().unwrap_or(0),
            xid: dhcp.xid,
            chaddr: dhcp.chaddr,
            addresses: [
                ("from", dhcp.from_ip),
                ("to", dhcp.to_ip),
                ("ciaddr", dhcp.ciaddr),
                ("yiaddr", dhcp.yiaddr),
            ],
            options: options.cloned().collect(),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = if self.from_vm { "vm" } else { "server" };
        let kind = match self.kind {
            DISCOVER => "DISCOVER",
            OFFER => "OFFER",
            REQUEST => "REQUEST",
            DECLINE => "DECLINE",
            ACK => "ACK",
            NAK => "NAK",
            RELEASE => "RELEASE",
            wire::INFORM => "INFORM",
            _ => "?",
        };
        write!(
            f,
            "{from} {kind} xid {:08x} chaddr {}",
            self.xid, self.chaddr
        )?;
        for (name, address) in &self.addresses {
            if !address.is_unspecified() {
                write!(f, " {name} {address}")?;
            }
        }
        for (code, value) in &self.options {
            let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            write!(f, " {code}={hex}")?;
        }
        Ok(())
    }
}

lab_test! {
    #[ignore = "makes a fixture anew"]
    fn record_udhcpc_and_dnsmasq() {
        record("udhcpc-dnsmasq", Client::Udhcpc, ServerKind::Dnsmasq, &["udhcpc", "dnsmasq-base"])
    }

    #[ignore = "makes a fixture anew"]
    fn record_udhcpc_and_kea() {
        record("udhcpc-kea", Client::Udhcpc, ServerKind::Kea, &["udhcpc", "kea-dhcp4-server"])
    }

    #[ignore = "makes a fixture anew"]
    fn record_dhclient_and_dnsmasq() {
        record("dhclient-dnsmasq", Client::Dhclient, ServerKind::Dnsmasq, &["isc-dhcp-client", "dnsmasq-base"])
    }

    #[ignore = "makes a fixture anew"]
    fn record_dhclient_and_isc() {
        record("dhclient-isc", Client::Dhclient, ServerKind::Isc, &["isc-dhcp-client", "isc-dhcp-server"])
    }

    #[ignore = "makes a fixture anew"]
    fn record_dhcpcd_and_dnsmasq() {
        record("dhcpcd-dnsmasq", Client::Dhcpcd, ServerKind::Dnsmasq, &["dhcpcd-base", "dnsmasq-base"])
    }

    #[ignore = "makes a fixture anew"]
    fn record_networkd_and_dnsmasq() {
        record("networkd-dnsmasq", Client::Networkd, ServerKind::Dnsmasq, &["systemd", "dnsmasq-base"])
    }

    #[ignore = "makes a fixture anew"]
    fn record_ipxe_and_dnsmasq() {
        record_ipxe("ipxe-dnsmasq", &["ipxe-qemu", "qemu-system-x86", "dnsmasq-base"])
    }
}

/// A VM takes a lease, renews it at T1, and gives it back if its client ever does.
fn record(name: &str, client: Client, server: ServerKind, packages: &[&str]) -> Result<()> {
    // dhcpcd takes no T1 that is shorter than its shortest lease.
    let renewal = if client == Client::Dhcpcd { 25 } else { 4 };
    let pool = Pool {
        renewal: Some(renewal),
        ..Pool::small(5)
    };
    let world = World::with_pool(server, Place::Remote, pool)?;
    let mut vm = Vm::off(&world.node, "vm1", vm_mac(1))?;
    vm.plug_in()?;
    let wire = Capture::start(&world.node.netns, "vm1")?;
    let shark = Tshark::start(&world.node.netns, "vm1")?;
    vm.wait_forwarding(PATIENCE)?;
    vm.start_client(client)?;
    let ip = vm.wait_lease(PATIENCE)?;
    let of_kind = |frame: &Frame, kind| frame.dhcp().is_some_and(|d| d.kind() == Some(kind));
    // udhcpc has a T1 of its own, half of the lease's time.
    let renews = if client == Client::Udhcpc {
        vm.renew()?;
        "renews it when told to"
    } else {
        "renews it at T1"
    };
    wire.wait_nth("the renewal", 2, LONG, |frame| of_kind(frame, ACK))
        .with_context(|| vm.client_log())?;
    let name_of = format!("{client:?}").to_lowercase();
    let about = if client == Client::Networkd {
        format!("{name_of} takes a lease from {server} and {renews}; it was told to give none back")
    } else {
        vm.release()?;
        wire.wait("its end", PATIENCE, |frame| of_kind(frame, RELEASE))?;
        world.server.wait_gone(ip, PATIENCE)?;
        format!("{name_of} takes a lease from {server}, {renews}, and gives it back")
    };
    save(name, &about, packages, &wire, shark)
}

/// A diskless qemu boots from its network card's own ROM.
fn record_ipxe(name: &str, packages: &[&str]) -> Result<()> {
    let world = World::new(ServerKind::Dnsmasq, Place::Remote, 5)?;
    world.node.netns.ip(&format!(
        "tuntap add vm1 mode tap
         link set vm1 master {BRIDGE} up"
    ))?;
    let wire = Capture::start(&world.node.netns, "vm1")?;
    let shark = Tshark::start(&world.node.netns, "vm1")?;
    // Not a copy: it finds its modules from where it is.
    let qemu = find("qemu-system-x86_64").context("qemu-system-x86 is not installed")?;
    let mut qemu = world.node.netns.command(qemu);
    qemu.args([
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-m",
        "128",
        "-boot",
        "n",
    ]);
    qemu.args([
        "-netdev",
        "tap,id=nic,ifname=vm1,script=no,downscript=no",
        "-device",
    ]);
    qemu.arg(format!("virtio-net-pci,netdev=nic,mac={}", vm_mac(1)));
    let mut qemu = Process::spawn(Path::new(DIR), "qemu", &mut qemu)?;
    let acked = wire.wait("iPXE's lease", LONG, |frame| {
        frame.dhcp().is_some_and(|dhcp| dhcp.kind() == Some(ACK))
    });
    acked.with_context(|| qemu.log())?;
    qemu.kill();
    let about = "iPXE, from the ROM of qemu's network card, takes a lease from dnsmasq; it never \
                 renews one, nor gives one back";
    save(name, about, packages, &wire, shark)
}

/// Somebody else's recorder, of DHCP only.
struct Tshark {
    process: Process,
    file: PathBuf,
}

impl Tshark {
    fn start(netns: &NetNs, link: &str) -> Result<Self> {
        let file = Path::new(DIR).join("tshark.pcap");
        let program = find("tshark").context("tshark is not installed")?;
        let mut command = netns.command(program);
        command.args(["-n", "-i", link, "-f", "udp port 67 or udp port 68"]);
        command.args(["-l", "-P", "-F", "pcap", "-w"]).arg(&file);
        let mut process = Process::spawn(Path::new(DIR), "tshark", &mut command)?;
        // It makes the file once it listens.
        process.wait_log(&["Capture started"], PATIENCE)?;
        Ok(Self { process, file })
    }

    /// Once it has told so many frames: it is given them by and by.
    fn stop(mut self, frames: usize) -> Result<PathBuf> {
        self.process
            .wait_log_nth("Transaction ID", frames, PATIENCE)?;
        self.process.signal(Signal::SIGINT)?;
        let status = self.process.wait_end(PATIENCE)?;
        ensure!(status.success(), "tshark {status}: {}", self.process.log());
        Ok(self.file)
    }
}

/// As tshark wrote it, if the lab's own capture has the same frames.
fn save(name: &str, about: &str, packages: &[&str], wire: &Capture, shark: Tshark) -> Result<()> {
    let seen = wire.frames();
    let seen = seen.iter().filter(|frame| frame.dhcp().is_some()).count();
    let capture = shark.stop(seen)?;
    let (mut frames, mut records) = (Vec::new(), Vec::new());
    for frame in wire.frames() {
        if let Some(dhcp) = frame.dhcp() {
            records.push(Row::of_dhcp(&dhcp).to_string());
            frames.push(frame.bytes);
        }
    }
    let recorded = pcap::read(&capture)?;
    ensure!(
        recorded.len() >= seen,
        "tshark has {} of {seen}",
        recorded.len()
    );
    // A renewal may have come when tshark was told to end.
    frames.truncate(recorded.len());
    records.truncate(recorded.len());
    ensure!(records.len() >= 4, "too few: {records:?}");
    ensure!(
        recorded == frames,
        "tshark has {} frames, and others than the lab: {records:?}",
        recorded.len()
    );
    let description = Description {
        about: about.to_owned(),
        made_with: packages
            .iter()
            .chain(&["tshark"])
            .map(|name| version(name))
            .collect::<Result<_>>()?,
        records,
    };
    let file = Path::new(CAPTURES).join(name);
    fs::create_dir_all(CAPTURES)?;
    fs::write(
        file.with_extension("toml"),
        toml::to_string_pretty(&description)?,
    )?;
    fs::copy(capture, file.with_extension("pcap"))?;
    Ok(())
}

fn version(package: &str) -> Result<String> {
    let mut dpkg = Command::new("dpkg-query");
    dpkg.args(["--show", "--showformat=${Package} ${Version}", package]);
    run(&mut dpkg)
}
