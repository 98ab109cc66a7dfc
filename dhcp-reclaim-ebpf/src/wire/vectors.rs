//! Frames with their meaning: what unit tests, test runs in the kernel and fuzzers start from.

use std::{vec, vec::Vec};

use super::{ACK, DECLINE, DISCOVER, NAK, Outcome, RELEASE, REQUEST, Tag};
use crate::abi::{
    ANOMALY_DUPLICATE, ANOMALY_FRAGMENT, ANOMALY_HARDWARE_TYPE, ANOMALY_LENGTHS, ANOMALY_NO_END,
    ANOMALY_OPTION_LENGTH, ANOMALY_OVERRUN, ANOMALY_STACKED_TAGS, ANOMALY_TOO_MANY,
};

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
pub const CLIENT_IP: [u8; 4] = [192, 0, 2, 50];
pub const SERVER_IP: [u8; 4] = [192, 0, 2, 1];
pub const XID: [u8; 4] = [0xde, 0xad, 0xbe, 0xef];

/// A frame, and what it is to be taken for.
#[derive(Clone, Debug)]
pub struct Vector {
    pub name: &'static str,
    pub frame: Vec<u8>,
    /// The tag in the metadata, which a test run cannot set.
    pub tag: Tag,
    pub outcome: Outcome,
    pub anomalies: u16,
}

/// A DHCP message, with any of its lengths and numbers bent.
#[derive(Clone, Debug)]
pub struct Builder {
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    /// VLAN tags in the frame: TPID, TCI.
    pub tags: Vec<(u16, u16)>,
    pub ethertype: u16,
    pub version_ihl: Option<u8>,
    pub ip_options: Vec<u8>,
    pub fragment: u16,
    pub protocol: u8,
    pub source_ip: [u8; 4],
    pub destination_ip: [u8; 4],
    pub source_port: u16,
    pub destination_port: u16,
    /// Added to the true lengths.
    pub ip_length: i32,
    pub udp_length: i32,
    pub op: u8,
    pub htype: u8,
    pub hlen: u8,
    pub ciaddr: [u8; 4],
    pub yiaddr: [u8; 4],
    pub sname: Vec<u8>,
    pub file: Vec<u8>,
    pub cookie: [u8; 4],
    pub options: Vec<u8>,
    pub end: bool,
    /// Bytes behind the datagram.
    pub trailer: usize,
}

impl Builder {
    /// A client's message of this type.
    pub fn client(kind: u8) -> Self {
        Self {
            destination_mac: [0xff; 6],
            source_mac: CLIENT_MAC,
            tags: vec![],
            ethertype: 0x0800,
            version_ihl: None,
            ip_options: vec![],
            fragment: 0,
            protocol: 17,
            source_ip: [0; 4],
            destination_ip: [0xff; 4],
            source_port: 68,
            destination_port: 67,
            ip_length: 0,
            udp_length: 0,
            op: 1,
            htype: 1,
            hlen: 6,
            ciaddr: [0; 4],
            yiaddr: [0; 4],
            sname: vec![],
            file: vec![],
            cookie: [0x63, 0x82, 0x53, 0x63],
            options: vec![53, 1, kind],
            end: true,
            trailer: 0,
        }
    }

    /// A server's message of this type, with a lease of an hour.
    pub fn server(kind: u8) -> Self {
        Self {
            destination_mac: CLIENT_MAC,
            source_mac: SERVER_MAC,
            source_ip: SERVER_IP,
            destination_ip: CLIENT_IP,
            source_port: 67,
            destination_port: 68,
            op: 2,
            yiaddr: CLIENT_IP,
            ..Self::client(kind)
        }
        .option(54, &SERVER_IP)
        .option(51, &3600_u32.to_be_bytes())
        .option(58, &1800_u32.to_be_bytes())
        .option(59, &3150_u32.to_be_bytes())
    }

    /// A REQUEST in state SELECTING (RFC 2131 section 4.3.2).
    pub fn selecting() -> Self {
        Self::client(REQUEST)
            .option(50, &CLIENT_IP)
            .option(54, &SERVER_IP)
            .option(61, &[1, 2, 0, 0, 0, 0, 1])
    }

    /// Appends an option.
    #[must_use]
    pub fn option(mut self, code: u8, value: &[u8]) -> Self {
        self.options.extend(option(code, value));
        self
    }

    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.options.extend(bytes);
        self
    }

    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut bootp = vec![0; 240];
        bootp[0] = self.op;
        bootp[1] = self.htype;
        bootp[2] = self.hlen;
        bootp[4..8].copy_from_slice(&XID);
        bootp[10] = 0x80;
        bootp[12..16].copy_from_slice(&self.ciaddr);
        bootp[16..20].copy_from_slice(&self.yiaddr);
        bootp[28..34].copy_from_slice(&CLIENT_MAC);
        bootp[44..44 + self.sname.len()].copy_from_slice(&self.sname);
        bootp[108..108 + self.file.len()].copy_from_slice(&self.file);
        bootp[236..240].copy_from_slice(&self.cookie);
        bootp.extend(&self.options);
        if self.end {
            bootp.push(255);
        }

        let header = 20 + self.ip_options.len();
        let lied = |true_length: usize, by: i32| (true_length as i32 + by) as u16;
        let mut frame = vec![];
        frame.extend(self.destination_mac);
        frame.extend(self.source_mac);
        for (protocol, tci) in &self.tags {
            frame.extend(protocol.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(self.ethertype.to_be_bytes());
        frame.push(self.version_ihl.unwrap_or(0x40 | (header / 4) as u8));
        frame.push(0);
        frame.extend(lied(header + 8 + bootp.len(), self.ip_length).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(self.fragment.to_be_bytes());
        frame.extend([64, self.protocol, 0, 0]);
        frame.extend(self.source_ip);
        frame.extend(self.destination_ip);
        frame.extend(&self.ip_options);
        frame.extend(self.source_port.to_be_bytes());
        frame.extend(self.destination_port.to_be_bytes());
        frame.extend(lied(8 + bootp.len(), self.udp_length).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(bootp);
        frame.extend(vec![0; self.trailer]);
        frame
    }
}

/// One option, encoded.
pub fn option(code: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![code, value.len() as u8];
    bytes.extend(value);
    bytes
}

/// A TCP segment without data, as most of what a VM sends.
pub fn tcp() -> Vec<u8> {
    let mut frame = Builder::client(REQUEST).with(|b| b.protocol = 6).build();
    frame.truncate(60);
    frame
}

/// An ARP request or reply, as guests send it: without padding.
pub fn arp(source_mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(source_mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
    frame.extend(source_mac);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend(SERVER_IP);
    frame
}

/// Every case that the classifier tells apart.
pub fn all() -> Vec<Vector> {
    let selecting = Builder::selecting;
    let mut vectors = vec![];
    let mut add = |name, outcome, anomalies, builder: Builder| {
        vectors.push(Vector {
            name,
            frame: builder.build(),
            tag: Tag::NONE,
            outcome,
            anomalies,
        });
    };

    let mut good = |name, builder| add(name, Outcome::Message, 0, builder);
    good("selecting", selecting());
    good("discover", Builder::client(DISCOVER));
    good(
        "discover, rapid commit",
        Builder::client(DISCOVER).option(80, &[]),
    );
    good(
        "decline",
        Builder::client(DECLINE)
            .option(50, &CLIENT_IP)
            .option(54, &SERVER_IP),
    );
    good("release", Builder::client(RELEASE).option(54, &SERVER_IP));
    good("unknown type", Builder::client(99));
    good(
        "renewing",
        Builder::client(REQUEST).with(|b| {
            b.ciaddr = CLIENT_IP;
            b.source_ip = CLIENT_IP;
            b.destination_ip = SERVER_IP;
            b.destination_mac = SERVER_MAC;
        }),
    );
    good("ack", Builder::server(ACK));
    good("nak", Builder::server(NAK));
    good(
        "relayed",
        Builder::server(ACK)
            .option(82, &[1, 2, 3, 4])
            .with(|b| b.destination_port = 67),
    );
    good(
        "client from another port",
        selecting().with(|b| b.source_port = 4711),
    );
    good(
        "plain BOOTP",
        Builder::client(REQUEST).with(|b| b.options.clear()),
    );
    good(
        "other options",
        selecting()
            .option(12, b"host")
            .option(55, &[1, 3, 6, 15])
            .option(57, &[5, 220]),
    );
    good(
        "client-id of 255",
        Builder::client(REQUEST).option(61, &[0xc1; 255]),
    );
    good(
        "client-id of 2",
        Builder::client(REQUEST).option(61, &[0, 7]),
    );
    good(
        "pads between",
        Builder::client(REQUEST)
            .raw(&[0; 60])
            .option(50, &CLIENT_IP),
    );
    good("padded frame", selecting().with(|b| b.trailer = 40));
    good(
        "IP options",
        selecting().with(|b| b.ip_options = vec![1; 40]),
    );
    good(
        "one tag",
        selecting().with(|b| b.tags = vec![(0x8100, 0x6064)]),
    );
    good(
        "priority tag",
        selecting().with(|b| b.tags = vec![(0x8100, 0xe000)]),
    );
    good(
        "one tag, IP options",
        selecting().with(|b| {
            b.tags = vec![(0x8100, 100)];
            b.ip_options = vec![1; 4];
        }),
    );
    good(
        "overload of file",
        Builder::client(REQUEST).option(52, &[1]).with(|b| {
            b.file = [option(50, &CLIENT_IP), vec![255]].concat();
        }),
    );
    good(
        "overload of sname",
        Builder::client(REQUEST).option(52, &[2]).with(|b| {
            b.sname = [option(61, &[9; 50]), vec![255]].concat();
        }),
    );
    good(
        "overload of both, full to the brim",
        Builder::client(REQUEST).option(52, &[3]).with(|b| {
            b.file = [option(61, &[7; 125]), vec![255]].concat();
            b.sname = [
                option(50, &CLIENT_IP),
                option(54, &SERVER_IP),
                vec![0; 51],
                vec![255],
            ]
            .concat();
        }),
    );
    good(
        "file and sname in use for names",
        selecting().with(|b| {
            b.file = vec![50; 128];
            b.sname = vec![54; 64];
        }),
    );
    good(
        "behind a long message",
        Builder::client(REQUEST)
            .option(43, &[0; 255])
            .option(43, &[0; 255])
            .option(43, &[0; 255])
            .option(43, &[0; 255])
            .option(43, &[0; 255])
            .option(43, &[0; 255])
            .option(50, &CLIENT_IP),
    );
    good(
        "end, then a buffer more",
        selecting().raw(&[255]).raw(&[0xaa; 2000]),
    );

    let mut odd = |name, anomaly, builder| add(name, Outcome::Message, anomaly, builder);
    odd(
        "length of 50",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).option(50, &[1, 2, 3]),
    );
    odd(
        "length of 51",
        ANOMALY_OPTION_LENGTH,
        Builder::client(ACK).option(51, &[0; 5]),
    );
    odd(
        "length of 53",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).with(|b| b.options = vec![53, 2, 3, 3]),
    );
    odd(
        "length of 54",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).option(54, &[]),
    );
    odd(
        "length of 58",
        ANOMALY_OPTION_LENGTH,
        Builder::client(ACK).option(58, &[0; 3]),
    );
    odd(
        "length of 59",
        ANOMALY_OPTION_LENGTH,
        Builder::client(ACK).option(59, &[0; 8]),
    );
    odd(
        "length of 61",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).option(61, &[1]),
    );
    odd(
        "length of 80",
        ANOMALY_OPTION_LENGTH,
        Builder::client(DISCOVER).option(80, &[1]),
    );
    odd(
        "length of 82",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).option(82, &[]),
    );
    odd(
        "length of 52",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).option(52, &[1, 1]),
    );
    odd(
        "value of 52",
        ANOMALY_OPTION_LENGTH,
        Builder::client(REQUEST).option(52, &[4]),
    );
    odd(
        "53 twice",
        ANOMALY_DUPLICATE,
        Builder::client(REQUEST).option(53, &[RELEASE]),
    );
    odd(
        "50 twice",
        ANOMALY_DUPLICATE,
        selecting().option(50, &[10, 0, 0, 1]),
    );
    odd(
        "split client-id",
        ANOMALY_DUPLICATE,
        selecting().option(61, &[5; 10]),
    );
    odd(
        "52 twice",
        ANOMALY_DUPLICATE,
        Builder::client(REQUEST)
            .option(52, &[1])
            .option(52, &[1])
            .with(|b| b.file = vec![255]),
    );
    odd(
        "53 again in file",
        ANOMALY_DUPLICATE,
        Builder::client(REQUEST)
            .option(52, &[1])
            .with(|b| b.file = vec![53, 1, DECLINE, 255]),
    );
    odd(
        "no end",
        ANOMALY_NO_END,
        selecting().with(|b| b.end = false),
    );
    odd(
        "no options",
        ANOMALY_NO_END,
        Builder::client(REQUEST).with(|b| {
            b.options.clear();
            b.end = false;
        }),
    );
    odd(
        "no end in file",
        ANOMALY_NO_END,
        Builder::client(REQUEST)
            .option(52, &[1])
            .with(|b| b.file = option(12, &[0; 126])),
    );
    odd(
        "empty file",
        ANOMALY_TOO_MANY,
        Builder::client(REQUEST).option(52, &[1]),
    );
    odd(
        "runs past the end",
        ANOMALY_OVERRUN,
        selecting().raw(&[12, 200, 1]).with(|b| b.end = false),
    );
    odd(
        "ends within an option's head",
        ANOMALY_OVERRUN,
        selecting().raw(&[12]).with(|b| b.end = false),
    );
    odd(
        "runs past sname into file",
        ANOMALY_OVERRUN,
        Builder::client(REQUEST)
            .option(52, &[2])
            .with(|b| b.sname = [option(12, &[0; 60]), vec![61, 9]].concat()),
    );
    odd(
        "pad flood",
        ANOMALY_TOO_MANY,
        Builder::client(REQUEST)
            .raw(&[0; 120])
            .option(54, &SERVER_IP),
    );
    odd(
        "more than the buffer",
        ANOMALY_TOO_MANY,
        (0..9).fold(Builder::client(REQUEST), |b, _| b.option(43, &[0; 255])),
    );
    odd(
        "first fragment",
        ANOMALY_FRAGMENT,
        selecting().with(|b| {
            b.fragment = 0x2000;
            b.udp_length = 600;
        }),
    );
    odd(
        "UDP shorter than IP",
        ANOMALY_LENGTHS | ANOMALY_NO_END,
        selecting().with(|b| b.udp_length = -1),
    );
    odd(
        "UDP longer than IP",
        ANOMALY_LENGTHS,
        selecting().with(|b| b.udp_length = 4),
    );
    odd(
        "IP shorter than UDP",
        ANOMALY_LENGTHS | ANOMALY_NO_END,
        selecting().with(|b| b.ip_length = -1),
    );
    odd(
        "two tags",
        ANOMALY_STACKED_TAGS,
        selecting().with(|b| b.tags = vec![(0x8100, 5), (0x8100, 6)]),
    );
    odd(
        "service tag",
        ANOMALY_STACKED_TAGS,
        selecting().with(|b| b.tags = vec![(0x88a8, 5)]),
    );
    odd(
        "QinQ",
        ANOMALY_STACKED_TAGS,
        selecting().with(|b| b.tags = vec![(0x88a8, 5), (0x8100, 6)]),
    );
    odd(
        "old QinQ",
        ANOMALY_STACKED_TAGS,
        selecting().with(|b| b.tags = vec![(0x9100, 5), (0x8100, 6)]),
    );
    odd(
        "hlen",
        ANOMALY_HARDWARE_TYPE,
        selecting().with(|b| b.hlen = 255),
    );
    odd(
        "htype",
        ANOMALY_HARDWARE_TYPE,
        selecting().with(|b| b.htype = 6),
    );

    add(
        "later fragment",
        Outcome::Other,
        0,
        selecting().with(|b| b.fragment = 0x2010),
    );
    add(
        "three tags",
        Outcome::Other,
        0,
        selecting().with(|b| {
            b.tags = vec![(0x8100, 5), (0x8100, 6), (0x8100, 7)];
        }),
    );
    add(
        "PPPoE",
        Outcome::Other,
        0,
        selecting().with(|b| b.ethertype = 0x8864),
    );
    add(
        "IPv6",
        Outcome::Other,
        0,
        selecting().with(|b| b.ethertype = 0x86dd),
    );
    add(
        "version 5",
        Outcome::Other,
        0,
        selecting().with(|b| b.version_ihl = Some(0x55)),
    );
    add(
        "header of 16",
        Outcome::Other,
        0,
        selecting().with(|b| b.version_ihl = Some(0x44)),
    );
    add(
        "DNS",
        Outcome::Other,
        0,
        selecting().with(|b| b.destination_port = 53),
    );
    add(
        "IP longer than the frame",
        Outcome::Truncated,
        0,
        selecting().with(|b| b.ip_length = 1),
    );
    add(
        "IP shorter than its header",
        Outcome::Truncated,
        0,
        selecting().with(|b| b.ip_length = -300),
    );
    add("UDP length of 7", Outcome::Truncated, 0, {
        let true_length = 8 + 240 + selecting().options.len() as i32 + 1;
        selecting().with(|b| b.udp_length = 7 - true_length)
    });
    add("op 3", Outcome::NotDhcp, 0, selecting().with(|b| b.op = 3));
    add(
        "no cookie",
        Outcome::NotDhcp,
        0,
        selecting().with(|b| b.cookie = [0; 4]),
    );

    let frame = selecting().build();
    let mut cut = |name, len: usize, outcome| {
        let frame = frame[..len].to_vec();
        vectors.push(Vector {
            name,
            frame,
            tag: Tag::NONE,
            outcome,
            anomalies: 0,
        });
    };
    cut("cut in the Ethernet header", 14, Outcome::Other);
    cut("cut in the UDP header", 41, Outcome::Other);
    cut("cut behind the UDP header", 46, Outcome::Truncated);
    cut("cut in the options", 290, Outcome::Truncated);
    vectors.push(Vector {
        name: "TCP",
        frame: tcp(),
        tag: Tag::NONE,
        outcome: Outcome::Other,
        anomalies: 0,
    });
    vectors.push(Vector {
        name: "ARP",
        frame: arp(CLIENT_MAC, CLIENT_IP),
        tag: Tag::NONE,
        outcome: Outcome::Other,
        anomalies: 0,
    });

    let mut tagged = |name, protocol, tci, anomalies, builder: Builder| {
        let tag = Tag { protocol, tci };
        let frame = builder.build();
        vectors.push(Vector {
            name,
            frame,
            tag,
            outcome: Outcome::Message,
            anomalies,
        });
    };
    tagged("tag in metadata", 0x8100, 0x6064, 0, selecting());
    tagged("priority tag in metadata", 0x8100, 0x6000, 0, selecting());
    tagged(
        "service tag in metadata",
        0x88a8,
        5,
        ANOMALY_STACKED_TAGS,
        selecting(),
    );
    tagged(
        "tags in metadata and frame",
        0x8100,
        5,
        ANOMALY_STACKED_TAGS,
        selecting().with(|b| {
            b.tags = vec![(0x8100, 6)];
        }),
    );
    vectors
}
