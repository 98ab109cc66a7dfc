//! The three formats.

use std::{collections::BTreeMap, net::Ipv4Addr};

use jiff::Timestamp;
use serde::Deserialize;

use super::{Format, Lease};
use crate::{control::client_id_bytes, core::MacAddr};

/// Text of a file in an error message.
const QUOTED: usize = 40;
const INFINITE: u64 = u32::MAX as u64;

const MEND: &str = "name its format with --format, or mend the line";
const TORN: &str = "the server may be writing it: try again, or name its format with --format";

pub(super) struct Wrong {
    pub(super) line: usize,
    pub(super) problem: String,
    pub(super) mend: &'static str,
}

pub(super) fn recognise(text: &str) -> Option<Format> {
    let first = text.lines().find(|line| !line.trim().is_empty())?.trim();
    if first.starts_with('[') {
        return Some(Format::Libvirt);
    }
    if first.starts_with("address,") {
        return Some(Format::Kea);
    }
    let word = first.split_whitespace().next()?;
    let number = word.bytes().all(|byte| byte.is_ascii_digit());
    (number || word == "duid").then_some(Format::Dnsmasq)
}

/// Lines that end: the last one may still be written.
fn whole_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.split_inclusive('\n').enumerate();
    lines.filter_map(|(index, line)| {
        let line = line.strip_suffix('\n')?;
        Some((index + 1, line.strip_suffix('\r').unwrap_or(line)))
    })
}

/// `EXPIRY MAC IP NAME CLIENT-ID` a line; leases of DHCPv6 follow a line `duid`.
pub(super) fn dnsmasq(text: &str) -> Result<Vec<Lease>, Wrong> {
    let mut leases = BTreeMap::new();
    for (line, content) in whole_lines(text) {
        if content.is_empty() {
            continue;
        }
        if content.starts_with("duid ") {
            break;
        }
        let fields: Vec<&str> = content.split_whitespace().collect();
        let &[expiry, mac, ip, _name, ref rest @ ..] = fields.as_slice() else {
            let problem = format!("`{}` has fewer than four fields", quoted(content));
            return Err(Wrong {
                line,
                problem,
                mend: MEND,
            });
        };
        // A hardware type before it that is not Ethernet's: nothing that we could release.
        if mac.contains('-') {
            continue;
        }
        let expiry: u64 = number(line, "expiry", expiry)?;
        let ip = address(line, ip)?;
        let lease = Lease {
            ip,
            mac: station(line, mac)?,
            client_id: match rest.first() {
                None | Some(&"*") => None,
                Some(id) => client_id(line, id)?,
            },
            expires: (expiry != 0).then(|| at(expiry)),
        };
        leases.insert(ip, lease);
    }
    Ok(leases.into_values().collect())
}

/// A row for each change: the last one of an address counts. Columns are found by their heads.
pub(super) fn kea(text: &str) -> Result<Vec<Lease>, Wrong> {
    let mut lines = whole_lines(text);
    let Some((line, head)) = lines.next() else {
        return Ok(Vec::new());
    };
    let heads: Vec<&str> = head.split(',').collect();
    let column = |name: &str| {
        heads
            .iter()
            .position(|head| *head == name)
            .ok_or_else(|| Wrong {
                line,
                problem: format!("the head has no column `{name}`"),
                mend: "is this Kea's lease file for DHCPv4 (kea-leases4.csv)?",
            })
    };
    let (ip_at, mac_at, id_at) = (column("address")?, column("hwaddr")?, column("client_id")?);
    let (lifetime_at, expire_at) = (column("valid_lifetime")?, column("expire")?);
    let state_at = column("state")?;
    let mut leases = BTreeMap::new();
    for (line, content) in lines {
        if content.is_empty() {
            continue;
        }
        let fields: Vec<&str> = content.split(',').collect();
        let field = |at: usize| {
            fields.get(at).copied().ok_or_else(|| Wrong {
                line,
                problem: format!("`{}` has fewer fields than the head", quoted(content)),
                mend: MEND,
            })
        };
        let ip = address(line, field(ip_at)?)?;
        let lifetime: u64 = number(line, "valid_lifetime", field(lifetime_at)?)?;
        let expire: u64 = number(line, "expire", field(expire_at)?)?;
        let mac = field(mac_at)?;
        // Released, declined or reclaimed; or without the MAC of an Ethernet station.
        if field(state_at)? != "0" || lifetime == 0 || mac.len() != 17 {
            leases.remove(&ip);
            continue;
        }
        let lease = Lease {
            ip,
            mac: station(line, mac)?,
            client_id: match field(id_at)? {
                "" => None,
                id => client_id(line, id)?,
            },
            expires: (lifetime != INFINITE).then(|| at(expire)),
        };
        leases.insert(ip, lease);
    }
    Ok(leases.into_values().collect())
}

/// What libvirt's lease helper keeps. Fields of it that we do not know are no error.
pub(super) fn libvirt(text: &str) -> Result<Vec<Lease>, Wrong> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Entry {
        ip_address: String,
        mac_address: Option<String>,
        client_id: Option<String>,
        expiry_time: u64,
    }
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let entries: Vec<Entry> = serde_json::from_str(text).map_err(|error| Wrong {
        line: error.line(),
        // It may quote any length of what it does not like.
        problem: error.to_string().chars().take(200).collect(),
        mend: TORN,
    })?;
    let mut leases = BTreeMap::new();
    for (index, entry) in entries.into_iter().enumerate() {
        // No lines: JSON may have any. Entries are counted in their stead.
        let line = index + 1;
        // One of DHCPv6.
        if entry.ip_address.contains(':') {
            continue;
        }
        let Some(mac) = entry.mac_address else {
            continue;
        };
        let ip = address(line, &entry.ip_address)?;
        let lease = Lease {
            ip,
            mac: station(line, &mac)?,
            client_id: match entry.client_id.as_deref() {
                None | Some("" | "*") => None,
                Some(id) => client_id(line, id)?,
            },
            expires: (entry.expiry_time != 0).then(|| at(entry.expiry_time)),
        };
        leases.insert(ip, lease);
    }
    Ok(leases.into_values().collect())
}

fn number(line: usize, name: &str, text: &str) -> Result<u64, Wrong> {
    text.parse().map_err(|_| Wrong {
        line,
        problem: format!("{name} `{}` is no number", quoted(text)),
        mend: MEND,
    })
}

fn address(line: usize, text: &str) -> Result<Ipv4Addr, Wrong> {
    text.parse().map_err(|_| Wrong {
        line,
        problem: format!("`{}` is no IPv4 address", quoted(text)),
        mend: MEND,
    })
}

fn station(line: usize, text: &str) -> Result<MacAddr, Wrong> {
    text.parse().map_err(|_| Wrong {
        line,
        problem: format!("`{}` is no Ethernet address", quoted(text)),
        mend: MEND,
    })
}

/// Hexadecimal bytes with colons between them, as all three write them. One that is empty is none.
fn client_id(line: usize, text: &str) -> Result<Option<Vec<u8>>, Wrong> {
    match client_id_bytes(text) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(Wrong {
            line,
            problem: format!("`{}` is no client-id", quoted(text)),
            mend: MEND,
        }),
    }
}

fn at(seconds: u64) -> Timestamp {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .unwrap_or(Timestamp::MAX)
}

/// So much of a text as a message has room for, and harmless.
fn quoted(text: &str) -> String {
    let start: String = text.chars().take(QUOTED).collect();
    let more = if start.len() < text.len() { "..." } else { "" };
    format!("{}{more}", start.escape_debug())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::super::{parse, *};

    fn lease(n: u8, client_id: Option<&[u8]>, expires: Option<i64>) -> Lease {
        Lease {
            ip: Ipv4Addr::new(10, 0, 0, n),
            mac: MacAddr([2, 0, 0, 0, 0, n]),
            client_id: client_id.map(<[u8]>::to_vec),
            expires: expires.map(|at| Timestamp::from_second(at).unwrap()),
        }
    }

    fn read(text: &str) -> (Format, Vec<Lease>) {
        parse(Path::new("/leases"), text.as_bytes(), None).unwrap_or_else(|error| panic!("{error}"))
    }

    fn refused(text: &str, format: Option<Format>) -> String {
        parse(Path::new("/leases"), text.as_bytes(), format)
            .expect_err("it is refused")
            .to_string()
    }

    #[test]
    fn dnsmasq_has_a_line_a_lease() {
        let text = "1800000000 02:00:00:00:00:01 10.0.0.1 vm1 01:02:00:00:00:00:01\n\
                    0 02:00:00:00:00:02 10.0.0.2 * *\n\
                    1800000000 20-00:00:11 10.0.0.3 * *\n\
                    duid 00:01\n\
                    1800000000 7 fd00::1 * 00:01\n\
                    1800000000 02:00:00:00:00:04 10.0.0.";
        let id = [1, 2, 0, 0, 0, 0, 1];
        let leases = vec![
            lease(1, Some(&id), Some(1_800_000_000)),
            lease(2, None, None),
        ];
        assert_eq!(read(text), (Format::Dnsmasq, leases));
        assert_eq!(
            refused("", None),
            "/leases: neither dnsmasq's, Kea's nor libvirt's leases, as it seems; name its format with --format"
        );
        assert_eq!(
            refused("1 02:00 10.0.0.1 a *\n", None),
            "/leases:1: `02:00` is no Ethernet address; name its format with --format, or mend the line"
        );
        assert_eq!(
            parse(Path::new("/"), b"", Some(Format::Dnsmasq)).unwrap().1,
            []
        );
    }

    #[test]
    fn keas_last_row_of_an_address_counts() {
        let head = "address,hwaddr,client_id,valid_lifetime,expire,subnet_id,fqdn_fwd,fqdn_rev,\
                    hostname,state,user_context\n";
        let bound = "10.0.0.1,02:00:00:00:00:01,01:02,3600,1800000000,1,0,0,,0,\n";
        let freed = "10.0.0.1,02:00:00:00:00:01,,0,1800000000,1,0,0,,0,\n";
        let declined = "10.0.0.1,,,3600,1800000000,1,0,0,,1,\n";
        let forever = "10.0.0.2,02:00:00:00:00:02,,4294967295,1800000000,1,0,0,a&#x2cb,0,\n";
        let kea = |rows: &[&str]| read(&format!("{head}{}", rows.concat())).1;
        let one = || lease(1, Some(&[1, 2]), Some(1_800_000_000));
        assert_eq!(kea(&[bound]), [one()]);
        assert_eq!(kea(&[bound, freed]), []);
        assert_eq!(kea(&[bound, freed, bound]), [one()]);
        assert_eq!(kea(&[bound, declined, forever]), [lease(2, None, None)]);
        assert_eq!(kea(&[bound, "10.0.0.2,02:0"]), [one()]);
        let short = refused(&format!("{head}10.0.0.1,02:00:00:00:00:01\n"), None);
        assert!(short.starts_with("/leases:2: `10.0.0.1,02:00"), "{short}");
        assert!(refused("address,hwaddr\n", None).contains("no column `client_id`"));
    }

    #[test]
    fn libvirts_status_is_json() {
        let text = r#"[
  {
    "ip-address": "10.0.0.1",
    "mac-address": "02:00:00:00:00:01",
    "client-id": "01:02",
    "hostname": "vm1",
    "expiry-time": 1800000000
  },
  { "ip-address": "fd00::1", "iaid": "7", "expiry-time": 1800000000 },
  { "ip-address": "10.0.0.2", "mac-address": "02:00:00:00:00:02", "expiry-time": 0 }
]
"#;
        let leases = vec![
            lease(1, Some(&[1, 2]), Some(1_800_000_000)),
            lease(2, None, None),
        ];
        assert_eq!(read(text), (Format::Libvirt, leases));
        let torn = refused(&text[..60], None);
        assert!(torn.contains("may be writing it"), "{torn}");
    }

    #[test]
    fn a_guests_text_is_quoted_harmlessly() {
        let long = format!(
            "[{{\"ip-address\":\"a\",\"expiry-time\":\"{}\"}}]",
            "\\u001b".repeat(9999)
        );
        let error = refused(&long, None);
        assert!(!error.contains('\u{1b}') && error.len() < 400, "{error}");
        let name = "\u{1b}[2J".repeat(100);
        let error = refused(&format!("1 {name} 10.0.0.1 a *\n"), None);
        assert!(!error.contains('\u{1b}') && error.len() < 400, "{error}");
    }

    proptest! {
        #[test]
        fn survives_anything(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            for format in [None, Some(Format::Dnsmasq), Some(Format::Kea), Some(Format::Libvirt)] {
                let _read = parse(Path::new("/"), &bytes, format);
            }
        }

        #[test]
        fn survives_any_field(field in "[^\n]{0,40}") {
            let kea = format!("address,hwaddr,client_id,valid_lifetime,expire,state\n{field},{field},{field}\n");
            let dnsmasq = format!("1 {field} 10.0.0.1 {field} {field}\n");
            for text in [kea, dnsmasq] {
                let _read = parse(Path::new("/"), text.as_bytes(), None);
            }
        }
    }
}
