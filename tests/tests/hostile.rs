//! Bytes of anybody's making: what every room does with them, and what another decoder reads in them.

#[path = "../fuzz/targets.rs"]
mod targets;

mod seeds;

use std::{
    cell::{Cell, LazyCell},
    collections::{BTreeMap, BTreeSet},
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Once,
    thread::available_parallelism,
};

use dhcp_reclaim_ebpf::{
    abi::{
        ANOMALY_DUPLICATE, ANOMALY_FRAGMENT, ANOMALY_HARDWARE_TYPE, ANOMALY_LENGTHS,
        ANOMALY_OPTION_LENGTH, ANOMALY_OVERRUN, ANOMALY_TOO_MANY, PRESENT_CLIENT_ID,
        PRESENT_LEASE_TIME, PRESENT_MESSAGE_TYPE, PRESENT_RAPID_COMMIT, PRESENT_REBINDING_TIME,
        PRESENT_RELAY_AGENT, PRESENT_RENEWAL_TIME, PRESENT_REQUESTED_IP, PRESENT_SERVER_ID, Record,
    },
    wire::{Outcome, Tag, classify_frame, vectors::Builder},
};
use dhcp_reclaim_tests::{clock::now, corpus, mutate::Mutator};
use dhcproto::{
    Decodable as _, Decoder,
    v4::{DhcpOption, Message, OptionCode},
};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use seeds::{Shown, count, seeds};
use targets::{Buffers, TARGETS};

/// A fuzzer runs what has a file.
#[test]
fn every_target_is_fuzzed() {
    const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/fuzz_targets");
    let files = fs::read_dir(FILES).unwrap();
    let files: BTreeSet<_> = files.map(|file| file.unwrap().file_name()).collect();
    let targets = TARGETS
        .iter()
        .map(|target| format!("{}.rs", target.name).into());
    assert_eq!(files, targets.collect());
}

#[test]
fn every_corpus_is_survived() {
    for target in TARGETS {
        let entries = corpus::entries(target.name).unwrap_or_else(|error| panic!("{error:#}"));
        assert!(entries.len() > 5, "{}: {}", target.name, entries.len());
        for (name, bytes) in &entries {
            let _shown = Shown(name, bytes);
            (target.run)(bytes);
        }
    }
    for (name, frame) in seeds() {
        let _shown = Shown(&name, &frame);
        targets::classifier(&frame);
    }
}

#[test]
fn no_mutant_makes_the_classifier_panic() {
    const TAGS: [Tag; 4] = [
        Tag::NONE,
        Tag::NONE,
        Tag {
            protocol: 0x8100,
            tci: 0x6064,
        },
        Tag {
            protocol: 0x88a8,
            tci: 5,
        },
    ];
    let seeds: Vec<_> = seeds().into_iter().map(|(_, frame)| frame).collect();
    let threads = available_parallelism().map_or(1, usize::from) as u64;
    let each = count(600_000) / threads;
    let begin = now();
    let messages: u64 = std::thread::scope(|scope| {
        let run = |thread| {
            let seeds = &seeds;
            scope.spawn(move || {
                let mut mutator = Mutator::new(thread, seeds);
                let (mut buffers, mut frame) = (Buffers::default(), Vec::new());
                let mut messages = 0;
                for round in 0..each {
                    mutator.next(&mut frame);
                    let _shown = Shown("a mutant", &frame);
                    let record = buffers.check(&frame, TAGS[(round % 4) as usize]);
                    messages += u64::from(record.is_some());
                }
                messages
            })
        };
        let running: Vec<_> = (0..threads).map(run).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    let inputs = each * threads;
    let rate = inputs as f64 / begin.elapsed().as_secs_f64();
    println!("NOTE {inputs} classifier inputs, {messages} of them messages, {rate:.0} a second");
    assert!(messages > inputs / 3, "too wild: {messages} of {inputs}");
}

/// Why another decoder's view of a frame need not be the classifier's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Same,
    /// No UDP datagram to a DHCP port, for etherparse.
    NoDatagram,
    /// Nothing that dhcproto decodes.
    NotDecoded,
    /// dhcproto panics: why nothing of the agent's hands it a guest's options.
    Panicked,
    /// More than two VLAN tags, which no server on the segment reads.
    Tags,
    /// dhcproto looks neither at `op` nor at the cookie.
    NotDhcp,
    /// An option that comes twice or is split (RFC 3396), has a wrong length, or comes after one that
    /// ends behind the message or after too many: dhcproto reads another one than the classifier, or
    /// one more, and the classifier says that a server may.
    Ambiguous,
    /// An address of another length, or of other hardware than Ethernet, which the classifier says.
    Hardware,
    /// dhcproto does not read `file` and `sname` (option 52).
    Overload,
    /// dhcproto ends at the first option that it cannot read, one of no interest to us.
    EndsEarly,
}

#[test]
fn dhcproto_reads_what_the_classifier_reads() {
    let seeds = seeds();
    let mut verdicts = BTreeMap::new();
    for (name, frame) in &seeds {
        let _shown = Shown(name, frame);
        *verdicts.entry(compare(frame)).or_insert(0) += 1;
    }
    let seeds: Vec<_> = seeds.into_iter().map(|(_, frame)| frame).collect();
    let mut mutator = Mutator::new(7, &seeds);
    let mut frame = Vec::new();
    for _ in 0..count(60_000) {
        mutator.next(&mut frame);
        let _shown = Shown("a mutant", &frame);
        *verdicts.entry(compare(&frame)).or_insert(0) += 1;
    }
    println!("NOTE the classifier and dhcproto: {verdicts:?}");
    for verdict in [
        Verdict::Same,
        Verdict::NoDatagram,
        Verdict::NotDecoded,
        Verdict::Panicked,
        Verdict::Tags,
        Verdict::NotDhcp,
        Verdict::Ambiguous,
        Verdict::Hardware,
        Verdict::Overload,
        Verdict::EndsEarly,
    ] {
        let seen = verdicts.get(&verdict).copied().unwrap_or(0);
        assert!(seen > 10, "{verdict:?} {seen} times: no longer a reason?");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Messages as they should be: no difference, and no excuse.
    #[test]
    fn dhcproto_reads_good_messages_alike(
        kind in 1_u8..=8,
        op in 1_u8..=2,
        tag in proptest::option::of(0_u16..4096),
        addresses in any::<[[u8; 4]; 4]>(),
        times in any::<[Option<[u8; 4]>; 3]>(),
        id in proptest::option::of(proptest::collection::vec(any::<u8>(), 2..=255)),
        relay in any::<bool>(),
        name in "[a-z]{1,20}",
        pads in 0_usize..40,
    ) {
        let [ciaddr, yiaddr, requested, server] = addresses;
        let mut builder = Builder::client(kind)
            .option(12, name.as_bytes())
            .option(50, &requested)
            .raw(&vec![0; pads])
            .option(54, &server);
        for (code, time) in [51, 58, 59].into_iter().zip(times) {
            if let Some(time) = time {
                builder = builder.option(code, &time);
            }
        }
        if let Some(id) = &id {
            builder = builder.option(61, id);
        }
        if relay {
            builder = builder.option(82, &[1, 2, 0, 7]);
        }
        let frame = builder.with(|b| {
            (b.op, b.ciaddr, b.yiaddr) = (op, ciaddr, yiaddr);
            b.tags.extend(tag.map(|tag| (0x8100, tag)));
        });
        let frame = frame.build();
        prop_assert_eq!(compare(&frame), Verdict::Same);
        prop_assert_eq!(classify_frame(&frame, Tag::NONE).1.anomalies, 0);
    }
}

/// Panics on a difference for which there is no reason.
fn compare(frame: &[u8]) -> Verdict {
    let (outcome, ours) = classify_frame(frame, Tag::NONE);
    let Some((tags, payload)) = payload(frame) else {
        // A part of one, or one whose two lengths differ: the classifier reads on, and says so.
        let said = ours.anomalies & (ANOMALY_FRAGMENT | ANOMALY_LENGTHS) != 0;
        assert!(outcome != Outcome::Message || said, "{ours:?}");
        return Verdict::NoDatagram;
    };
    let decode = || Message::decode(&mut Decoder::new(payload));
    let theirs = match quietly(decode) {
        None => return Verdict::Panicked,
        Some(Err(_)) => return Verdict::NotDecoded,
        Some(Ok(message)) => message,
    };
    if tags > 2 {
        assert_eq!(outcome, Outcome::Other);
        return Verdict::Tags;
    }
    if !matches!(payload[0], 1 | 2) || payload[236..240] != [99, 130, 83, 99] {
        assert_eq!(outcome, Outcome::NotDhcp);
        return Verdict::NotDhcp;
    }
    assert_eq!(outcome, Outcome::Message, "{theirs:?}");

    assert_eq!(ours.op, u8::from(theirs.opcode()));
    assert_eq!(ours.xid, theirs.xid().to_be_bytes());
    assert_eq!(ours.flags, u16::from(theirs.flags()).to_be_bytes());
    assert_eq!(ours.ciaddr, theirs.ciaddr().octets());
    assert_eq!(ours.yiaddr, theirs.yiaddr().octets());
    assert_eq!(ours.giaddr, theirs.giaddr().octets());
    let said = |anomaly| ours.anomalies & anomaly != 0;
    let mut verdict = Verdict::Same;
    if said(ANOMALY_HARDWARE_TYPE) {
        verdict = Verdict::Hardware;
    } else {
        assert_eq!(ours.chaddr, theirs.chaddr());
    }

    let walked = LazyCell::new(|| walk(&payload[240..]));
    for code in CODES {
        let (mine, other) = (option_of(&ours, code), option_in(&theirs, code));
        if mine == other {
            continue;
        }
        let Walked {
            values,
            irregular,
            overload,
            refused,
        } = &*walked;
        let what = format!(
            "option {code}: {mine:?}, dhcproto {other:?}, anomalies {:#b}",
            ours.anomalies
        );
        if irregular.contains(&code) {
            assert!(said(OF_OPTIONS), "{what}");
            verdict = Verdict::Ambiguous;
        } else if mine.is_none() {
            assert!(said(ANOMALY_OVERRUN | ANOMALY_TOO_MANY), "{what}");
            verdict = Verdict::Ambiguous;
        } else {
            assert!(other.is_none() && (*overload || *refused), "{what}");
            let there = values.get(&code).cloned();
            assert!(*overload && there.is_none() || mine == there, "{what}");
            verdict = if *refused {
                Verdict::EndsEarly
            } else {
                Verdict::Overload
            };
        }
    }
    verdict
}

const OF_OPTIONS: u16 =
    ANOMALY_DUPLICATE | ANOMALY_OPTION_LENGTH | ANOMALY_OVERRUN | ANOMALY_TOO_MANY;
/// The options that a record has.
const CODES: [u8; 9] = [50, 51, 53, 54, 58, 59, 61, 80, 82];

/// What is in a UDP datagram over IPv4 to a port of DHCP, as etherparse finds it, and behind how
/// many tags.
fn payload(frame: &[u8]) -> Option<(usize, &[u8])> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) = (sliced.net, sliced.transport)
    else {
        return None;
    };
    let whole = !ip.header().is_fragmenting_payload();
    // To etherparse a length of zero is all that is there; UDP sockets drop such a datagram.
    let ours = whole && udp.length() >= 8 && matches!(udp.destination_port(), 67 | 68);
    ours.then(|| (sliced.link_exts.len(), udp.payload()))
}

fn option_of(record: &Record, code: u8) -> Option<Vec<u8>> {
    let (bit, value) = match code {
        50 => (PRESENT_REQUESTED_IP, &record.requested_ip[..]),
        51 => (PRESENT_LEASE_TIME, &record.lease_time[..]),
        53 => (
            PRESENT_MESSAGE_TYPE,
            std::slice::from_ref(&record.message_type),
        ),
        54 => (PRESENT_SERVER_ID, &record.server_id[..]),
        58 => (PRESENT_RENEWAL_TIME, &record.renewal_time[..]),
        59 => (PRESENT_REBINDING_TIME, &record.rebinding_time[..]),
        61 => {
            let length = usize::from(record.client_id_len);
            (PRESENT_CLIENT_ID, &record.client_id[..length])
        }
        80 => (PRESENT_RAPID_COMMIT, &[][..]),
        82 => (PRESENT_RELAY_AGENT, &[][..]),
        other => unreachable!("option {other} is not recorded"),
    };
    (record.present & bit != 0).then(|| value.to_vec())
}

fn option_in(message: &Message, code: u8) -> Option<Vec<u8>> {
    Some(match message.opts().get(OptionCode::from(code))? {
        DhcpOption::RequestedIpAddress(ip) | DhcpOption::ServerIdentifier(ip) => {
            ip.octets().to_vec()
        }
        DhcpOption::AddressLeaseTime(seconds)
        | DhcpOption::Renewal(seconds)
        | DhcpOption::Rebinding(seconds) => seconds.to_be_bytes().to_vec(),
        DhcpOption::MessageType(kind) => vec![u8::from(*kind)],
        DhcpOption::ClientIdentifier(id) => id.clone(),
        DhcpOption::RapidCommit | DhcpOption::RelayAgentInformation(_) => Vec::new(),
        other => panic!("option {code} is {other:?}"),
    })
}

/// What a field of options has.
#[derive(Default)]
struct Walked {
    /// What a record would have of each.
    values: BTreeMap<u8, Vec<u8>>,
    /// Codes that come more than once or with a length that RFC 2132 does not give them.
    irregular: BTreeSet<u8>,
    /// Option 52 is among them.
    overload: bool,
    /// dhcproto refuses one of them by itself.
    refused: bool,
}

/// It joins neighbours of the same code.
fn walk(mut options: &[u8]) -> Walked {
    let mut walked = Walked::default();
    while let [code, rest @ ..] = options {
        match code {
            0 => {
                options = rest;
                continue;
            }
            255 => break,
            _ => {}
        }
        let (mut length, mut pieces) = (0, 0);
        while options.get(length) == Some(code) {
            let data = options.get(length + 1).map_or(0, |data| usize::from(*data));
            let fits = match code {
                50 | 51 | 54 | 58 | 59 => data == 4,
                53 => data == 1,
                61 => data >= 2,
                80 => data == 0,
                82 => data != 0,
                _ => true,
            };
            if !fits {
                walked.irregular.insert(*code);
            }
            length += 2 + data;
            pieces += 1;
        }
        if pieces > 1 || walked.values.contains_key(code) {
            walked.irregular.insert(*code);
        }
        walked.overload |= *code == 52;
        let Some((these, rest)) = options.split_at_checked(length) else {
            break;
        };
        let value = match code {
            80 | 82 => Vec::new(),
            _ => these[2..].to_vec(),
        };
        walked.values.entry(*code).or_insert(value);
        let alone = [these, &[255]].concat();
        let read = quietly(|| DhcpOption::decode(&mut Decoder::new(&alone)).is_ok());
        walked.refused |= read != Some(true);
        options = rest;
    }
    walked
}

/// `None` if it panics, without a word on standard error.
fn quietly<T>(body: impl FnOnce() -> T) -> Option<T> {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(body));
    QUIET.set(false);
    result.ok()
}
