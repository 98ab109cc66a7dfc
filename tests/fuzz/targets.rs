//! What is fuzzed: functions of any bytes, which panic if something is wrong. Fuzzers and tests run
//! the same ones.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use dhcp_reclaim_agent::{
    config::{Options, Settings},
    control::{LineError, PauseView, Request, Response, json_line, printable, read_line},
    core::{MacAddr, Message, Probe, ProbeVia, Release, Time},
    kernel::message,
    leasefile::{Format, parse},
    packet::{
        arp,
        leasequery::{Reply, answer, lease, query, query_mac},
        release::{XID_OFFSET, release_frame},
    },
    store::{AuditEntry, Batch, BindingRow, Moment, OperatorEntry, PortRow, Store, TransactionRow},
};
use dhcp_reclaim_ebpf::{
    abi::{
        ANOMALY_OPTION_LENGTH, DIRECTION_FROM_PORT, DIRECTION_TO_PORT, PRESENT_CLIENT_ID,
        PRESENT_LEASE_TIME, PRESENT_MESSAGE_TYPE, PRESENT_REBINDING_TIME, PRESENT_RENEWAL_TIME,
        PRESENT_REQUESTED_IP, PRESENT_SERVER_ID, ROLE_ASIDE, ROLE_NONE, ROLE_UPLINK, ROLE_VM,
        Record,
    },
    wire::{
        FRAME_MAX, HEAD, Interest, Outcome, RELEASE, SOURCES_HEAD, Tag, Walk, candidate, classify,
        classify_frame, interest, sources,
    },
};
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use zerocopy::{FromBytes as _, FromZeros as _};

pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident)+) => {
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), run: $name }),+];
    };
}

targets! { classifier record leasequery control config leasefile row store }

/// A frame, and what the kernel may have taken off it before.
pub fn classifier(frame: &[u8]) {
    let tag = |protocol, tci| Tag { protocol, tci };
    for tag in [Tag::NONE, tag(0x8100, 0x6064), tag(0x88a8, 5)] {
        let mut buffers = Buffers::default();
        buffers.check(frame, tag);
    }
}

/// The classifier's memory, which in the kernel is never cleaned between two frames.
pub struct Buffers {
    clean: [u8; FRAME_MAX],
    soiled: [u8; FRAME_MAX],
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            clean: [0; FRAME_MAX],
            soiled: [0xa5; FRAME_MAX],
        }
    }
}

impl Buffers {
    /// What must hold of any frame; whether it is a message, and its record.
    pub fn check(&mut self, frame: &[u8], tag: Tag) -> Option<Record> {
        let kept = frame.len().min(FRAME_MAX);
        let head = frame.get(..kept).unwrap_or_default();
        self.clean[..kept].copy_from_slice(head);
        self.clean[kept..].fill(0);
        self.soiled[..kept].copy_from_slice(head);
        let (outcome, record) = classified(&self.clean, frame.len(), tag);
        let again = classified(&self.soiled, frame.len(), tag);
        assert_eq!((outcome, record), again, "read behind the frame's end");

        let mut short = [0; SOURCES_HEAD];
        let kept = frame.len().min(SOURCES_HEAD);
        short[..kept].copy_from_slice(&frame[..kept]);
        let seen = sources(&short, tag);

        let likely = frame.first_chunk::<HEAD>().is_some_and(candidate);
        assert!(
            likely || outcome == Outcome::Other,
            "the cheap test turns down what the thorough one takes"
        );
        if outcome != Outcome::Message {
            assert_eq!(record, Record::new_zeroed(), "written without a message");
            return None;
        }
        // What WATCH notes of a message is what its record says.
        if record.anomalies == 0 {
            let noted = (seen.vlan, seen.mac, seen.ip);
            assert_eq!(
                noted,
                (record.vlan, record.source_mac, record.source_ip),
                "seen as somebody else"
            );
        }
        check_record(&record);
        Some(record)
    }
}

fn classified(frame: &[u8; FRAME_MAX], len: usize, tag: Tag) -> (Outcome, Record) {
    let mut record = Record::new_zeroed();
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    let outcome = classify(frame, len, tag, &mut Walk::default(), &mut record);
    (outcome, record)
}

fn check_record(record: &Record) {
    let has = |bit| record.present & bit != 0;
    for (bit, value) in [
        (PRESENT_REQUESTED_IP, record.requested_ip),
        (PRESENT_SERVER_ID, record.server_id),
        (PRESENT_LEASE_TIME, record.lease_time),
        (PRESENT_RENEWAL_TIME, record.renewal_time),
        (PRESENT_REBINDING_TIME, record.rebinding_time),
        (PRESENT_MESSAGE_TYPE, [record.message_type, 0, 0, 0]),
    ] {
        assert!(has(bit) || value == [0; 4], "{bit} is absent, with a value");
    }
    let id = usize::from(record.client_id_len);
    assert_eq!(has(PRESENT_CLIENT_ID), id >= 2, "a client-id of {id} bytes");
    assert!(record.client_id[id..].iter().all(|byte| *byte == 0));
    assert!(record.op == 1 || record.op == 2, "op {}", record.op);
    for role in [ROLE_NONE, ROLE_VM, ROLE_UPLINK, ROLE_ASIDE] {
        for direction in [DIRECTION_FROM_PORT, DIRECTION_TO_PORT] {
            let wanted = interest(role, direction, record) != Interest::Nobody;
            assert!(role != ROLE_NONE || !wanted, "nobody's port");
            let record = Record {
                role,
                direction,
                ..*record
            };
            check_message(&record);
        }
    }
}

fn check_message(record: &Record) -> Option<Message> {
    let message = message(record).ok()?;
    assert_eq!(message.ambiguous, record.anomalies != 0);
    assert_eq!(message.chaddr, MacAddr(record.chaddr));
    Some(message)
}

/// A record of the ring, and what would be sent because of it.
pub fn record(bytes: &[u8]) {
    let mut whole = [0; size_of::<Record>()];
    let kept = bytes.len().min(whole.len());
    whole[..kept].copy_from_slice(&bytes[..kept]);
    let Ok(record) = Record::read_from_bytes(&whole) else {
        unreachable!("a record is plain bytes");
    };
    let Some(message) = check_message(&record) else {
        return;
    };
    let unset = Ipv4Addr::UNSPECIFIED;
    let ip = message.ciaddr.unwrap_or(unset);
    let probe = Probe {
        via: ProbeVia::Port(message.port),
        vlan: message.vlan,
        ip,
        mac: message.chaddr,
    };
    for frame in [
        arp::probe(message.source_mac, &probe),
        arp::who_has(message.source_mac, message.vlan, ip),
    ] {
        let seen = sources(frame.first_chunk().expect("60 bytes"), Tag::NONE);
        assert_eq!(seen.mac, message.source_mac.0);
        assert_eq!(u16::from_be_bytes(seen.vlan), message.vlan & 0xfff);
    }

    let release = Release {
        segment: 1,
        vlan: message.vlan,
        ip,
        chaddr: message.chaddr,
        client_id: message.client_id,
        server: message.server_id.unwrap_or(unset),
        server_mac: None,
        silent_since: message.seen_at,
    };
    let text = String::from_utf8_lossy(&bytes[kept..]);
    let server_mac = message.destination_mac;
    let Ok(frame) = release_frame(&release, server_mac, message.xid, &text) else {
        return;
    };
    assert_eq!(frame[XID_OFFSET..XID_OFFSET + 4], record.xid);
    let (outcome, read) = classify_frame(&frame, Tag::NONE);
    assert_eq!(outcome, Outcome::Message);
    let id = release.client_id.as_deref();
    let short = id.is_some_and(|id| id.len() < 2);
    let anomalies = if short { ANOMALY_OPTION_LENGTH } else { 0 };
    let kept_id = id.filter(|_| !short).unwrap_or_default();
    assert_eq!(
        (read.message_type, read.anomalies, read.xid),
        (RELEASE, anomalies, record.xid)
    );
    assert_eq!(read.client_id[..usize::from(read.client_id_len)], *kept_id);
    assert_eq!(
        (read.source_mac, read.chaddr, read.destination_mac),
        (release.chaddr.0, release.chaddr.0, server_mac.0)
    );
    let (ip, server) = (release.ip.octets(), release.server.octets());
    assert_eq!(
        (
            read.source_ip,
            read.ciaddr,
            read.destination_ip,
            read.server_id
        ),
        (ip, ip, server, server)
    );
}

/// A datagram to the socket that waits for the answer to a lease query.
pub fn leasequery(bytes: &[u8]) {
    if let Ok(Reply { xid, ip, .. }) = answer(bytes) {
        assert_eq!(bytes[0], 2, "not an answer");
        assert_eq!(bytes[4..8], xid.to_be_bytes());
        assert_eq!(bytes[12..16], ip.octets());
        let asked = query(ip, Ipv4Addr::LOCALHOST, xid).expect("any address can be asked about");
        assert!(answer(&asked).is_err(), "our own question answers itself");
    }
    if let Some(lease) = lease(bytes) {
        assert!(lease.mac.is_unicast(), "nobody's");
        assert_eq!(bytes[28..34], lease.mac.0);
        assert_eq!(bytes[12..16], lease.ip.octets());
        let asked = query_mac(lease.mac, Ipv4Addr::LOCALHOST, 1).expect("so can any MAC");
        assert!(answer(&asked).is_err(), "our own question answers itself");
    }
}

/// A line on the control socket, from either side.
pub fn control(line: &[u8]) {
    there_and_back::<Request>(line, "request");
    there_and_back::<Response>(line, "kind");
    let text = String::from_utf8_lossy(line);
    assert!(!printable(&text).contains(char::is_control));
}

fn there_and_back<T>(line: &[u8], tag: &str)
where
    T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug,
{
    let body = match read_line::<T>(line) {
        Ok(body) => body,
        Err(error @ (LineError::Version(_) | LineError::Json(_))) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let mut value = serde_json::to_value(&body).expect("it was JSON before");
    assert!(value[tag].is_string(), "{value}");
    value["v"] = dhcp_reclaim_agent::control::PROTOCOL.into();
    let line = json_line(&value).expect("it was JSON before");
    assert!(!line.contains(char::is_control));
    let again: T = read_line(line.as_bytes()).expect("what we write can be read");
    assert_eq!(again, body);
}

/// A configuration file.
pub fn config(text: &[u8]) {
    let Ok(text) = str::from_utf8(text) else {
        return;
    };
    let path = Path::new("/etc/dhcp-reclaim.toml");
    match Settings::parse(Options::default(), path, text) {
        Ok(settings) => {
            assert!(!settings.bridges.is_empty());
            assert!(settings.hold_down <= settings.hold_down_uplink);
            assert!(settings.hold_down <= settings.hold_down_silent);
            assert!(settings.misses > 0 && settings.rate > 0 && settings.burst > 0);
            let policy = settings.policy();
            assert!(
                policy
                    .breaker
                    .is_none_or(|share| 0.0 < share && share <= 1.0)
            );
            assert_eq!(settings.port_rules().bridges, settings.bridges);
        }
        Err(error) => {
            let said = error.to_string();
            assert!(
                said.starts_with("/etc/") || said.starts_with("--"),
                "{said}"
            );
        }
    }
}

/// A server's lease file: guests have a hand in names and client-ids.
pub fn leasefile(bytes: &[u8]) {
    let path = Path::new("/leases");
    for format in [
        None,
        Some(Format::Dnsmasq),
        Some(Format::Kea),
        Some(Format::Libvirt),
    ] {
        match parse(path, bytes, format) {
            Ok((_, leases)) => {
                for lease in leases {
                    let id = lease.client_id.as_deref();
                    assert!(id.is_none_or(|id| (1..=255).contains(&id.len())));
                }
            }
            Err(error) => {
                let said = error.to_string();
                assert!(said.starts_with("/leases:"), "{said}");
                assert!(!said.contains(char::is_control), "{said:?}");
                assert!(said.len() < 1000, "{said}");
            }
        }
    }
}

/// A row of the store.
pub fn row(json: &[u8]) {
    let now = moment();
    if let Ok(row) = serde_json::from_slice::<BindingRow>(json) {
        let bridge = row.bridge.clone();
        let saved = row.saved(7, &now);
        let again = BindingRow::new(&bridge, saved.clone(), &now);
        let again = serde_json::to_vec(&again).expect("a row is JSON");
        let again: BindingRow = serde_json::from_slice(&again).expect("what we write can be read");
        assert_eq!(again.saved(7, &now), saved);
    }
    if let Ok(row) = serde_json::from_slice::<TransactionRow>(json) {
        let saved = row.saved(&now);
        let again = TransactionRow::new(saved.clone(), &now);
        assert_eq!(again.saved(&now), saved);
    }
    if let Ok(row) = serde_json::from_slice::<PortRow>(json) {
        same_again(&row);
    }
    if let Ok(entry) = serde_json::from_slice::<AuditEntry>(json) {
        same_again(&entry);
    }
    if let Ok(pause) = serde_json::from_slice::<PauseView>(json) {
        same_again(&pause);
        assert!(!pause.text().is_empty());
    }
    if let Ok(entry) = serde_json::from_slice::<OperatorEntry>(json) {
        same_again(&entry);
    }
}

fn same_again<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(row: &T) {
    let json = serde_json::to_vec(row).expect("a row is JSON");
    let again: T = serde_json::from_slice(&json).expect("what we write can be read");
    assert_eq!(&again, row);
}

fn moment() -> Moment {
    Moment {
        boot: "fuzz".to_owned(),
        monotonic: Time::from_nanos(1_000_000_000_000),
        suspended: Duration::from_secs(7),
        wall: Timestamp::UNIX_EPOCH,
    }
}

/// A store whose file was damaged: each 8 bytes are a place and what is done there.
pub fn store(damage: &[u8]) {
    let mut file = good_store().to_vec();
    for step in damage.chunks_exact(8).take(32) {
        let at = usize::from_be_bytes([0, 0, 0, 0, 0, step[1], step[2], step[3]]);
        let at = at % file.len().max(1);
        let end = (at + usize::from(step[4]) * 64).min(file.len());
        match step[0] % 8 {
            0 => file.truncate(at),
            1 => file[at..end].fill(step[5]),
            2 => file.extend(std::iter::repeat_n(step[5], end - at)),
            3 => {
                let from = usize::from(step[6]) * 4096 % file.len().max(1);
                let length = (end - at).min(file.len() - from);
                let to = at.min(file.len() - length);
                file.copy_within(from..from + length, to);
            }
            _ => {
                for (byte, new) in file[at..].iter_mut().zip(&step[4..]) {
                    *byte = *new;
                }
            }
        }
        if file.is_empty() {
            break;
        }
    }
    let dir = memory_dir();
    std::fs::write(dir.path().join(FILE), file).expect("the test's own directory");
    let now = Timestamp::UNIX_EPOCH;
    let (mut store, _) = Store::open(dir.path(), now).expect("damage never stops the agent");
    let row = example_row(250);
    let mut batch = Batch::default();
    batch.binding("last".to_owned(), Some(&row));
    store
        .commit(&batch)
        .expect("a store that opens can be written");
    drop(store);
    let (_, memory) = Store::open(dir.path(), now).expect("and opened again");
    assert!(
        memory.bindings.contains(&row),
        "what was committed is there"
    );
}

const FILE: &str = "bindings.redb";

/// On a file system in memory where there is one: redb syncs its file.
fn memory_dir() -> tempfile::TempDir {
    let shm = PathBuf::from("/dev/shm");
    let dir = if shm.is_dir() {
        shm
    } else {
        std::env::temp_dir()
    };
    tempfile::tempdir_in(dir).expect("a directory for the test")
}

fn good_store() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let dir = memory_dir();
        let (mut store, _) = Store::open(dir.path(), Timestamp::UNIX_EPOCH).expect("a new store");
        for round in 0..4 {
            let mut batch = Batch::default();
            for n in 0..40 {
                let row = (n % 4 != round).then(|| example_row(n));
                batch.binding(format!("br0/0/10.0.0.{n}"), row.as_ref());
            }
            store.commit(&batch).expect("a good store");
        }
        drop(store);
        std::fs::read(dir.path().join(FILE)).expect("a good store")
    })
}

fn example_row(n: u8) -> BindingRow {
    let text = format!(
        r#"{{"bridge":"br0","vlan":0,"ip":"10.0.0.{n}","mac":"02:00:00:00:00:{n:02x}",
            "client_id":[1,2,3],"server":"10.0.0.254","server_mac":null,"ifindex":7,"port":"vm{n}",
            "state":"bound","acked":true,"seen_alive":true,"doubt":null,"expires":9000000000000,
            "tentative_until":null,"last_seen":null,
            "written":{{"boot":"fuzz","monotonic":1,"wall":"1970-01-01T00:00:00Z"}}}}"#
    );
    serde_json::from_str(&text).expect("a row")
}
