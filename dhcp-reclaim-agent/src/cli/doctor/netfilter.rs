//! Filters that our own frames meet: a RELEASE and a probe leave by the bridge itself, as frames of
//! this host. iptables does not see those (`br_netfilter` lets them pass); nftables' family `bridge`
//! does, of which ebtables is a part by now.

use std::{fs, io};

use super::Chart;
use crate::netlink::{self, attribute, text};

const NETLINK_NETFILTER: isize = 12;
/// `NFNL_SUBSYS_NFTABLES`, and its messages.
const NFTABLES: u16 = 10 << 8;
const NEWCHAIN: u16 = NFTABLES | 3;
const GETCHAIN: u16 = NFTABLES | 4;
const NFPROTO_BRIDGE: u8 = 7;
/// `struct nfgenmsg`.
const HEADER: usize = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_HOOK_HOOKNUM: u16 = 1;
/// `NF_BR_LOCAL_OUT`, `NF_BR_POST_ROUTING`, in network order.
const OUTPUT: [u8; 4] = [0, 0, 0, 3];
const POSTROUTING: [u8; 4] = [0, 0, 0, 4];

/// A base chain that what leaves by a bridge meets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chain {
    table: String,
    name: String,
}

pub(super) fn look(chart: &mut Chart) {
    match chains() {
        Ok(chains) => tell(&chains, chart),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => chart.warn(
            "bridge-filter",
            format!("nftables cannot be asked: {error}"),
            "run this as root",
        ),
        // What the kernel does not know filters nothing.
        Err(error) => chart.ok("bridge-filter", format!("no nftables: {error}")),
    }
}

fn tell(chains: &[Chain], chart: &mut Chart) {
    for Chain { table, name } in chains {
        chart.warn(
            "bridge-filter",
            format!(
                "nftables' table bridge {table} filters what leaves by a bridge: RELEASEs and probes too"
            ),
            format!("see that it lets ARP and UDP to port 67 pass: nft list chain bridge {table} {name}"),
        );
    }
    if chains.is_empty() {
        chart.ok(
            "bridge-filter",
            "no chain of nftables' family bridge sees what leaves by a bridge",
        );
    }
}

fn chains() -> io::Result<Vec<Chain>> {
    if would_be_loaded() {
        return Ok(Vec::new());
    }
    let mut chains = Vec::new();
    netlink::dump(NETLINK_NETFILTER, &request(), |kind, payload| {
        if kind == NEWCHAIN {
            chains.extend(chain(payload));
        }
    })?;
    Ok(chains)
}

/// To ask would load nftables' module, and nothing is to be changed.
fn would_be_loaded() -> bool {
    let Ok(modules) = fs::read_to_string("/proc/modules") else {
        return false;
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let builtin = format!("/lib/modules/{}/modules.builtin", release.trim());
    // A kernel whose list is not at hand is asked: what is built in must not be taken for absent.
    let is_module = fs::read_to_string(builtin).is_ok_and(|list| !list.contains("/nf_tables.ko"));
    is_module && !modules.lines().any(|it| it.starts_with("nf_tables "))
}

/// All chains of the family.
fn request() -> Vec<u8> {
    /// `NLM_F_REQUEST | NLM_F_DUMP`.
    const FLAGS: u16 = 0x301;
    let mut request = 20_u32.to_ne_bytes().to_vec();
    request.extend(GETCHAIN.to_ne_bytes());
    request.extend(FLAGS.to_ne_bytes());
    // Number and sender.
    request.extend([0; 8]);
    request.extend([NFPROTO_BRIDGE, 0, 0, 0]);
    request
}

/// `None` for one that is only jumped to, or sees what comes in.
fn chain(payload: &[u8]) -> Option<Chain> {
    let attributes = payload.get(HEADER..)?;
    let hook = attribute(attributes, NFTA_CHAIN_HOOK)?;
    let number = attribute(&hook, NFTA_HOOK_HOOKNUM)?;
    [OUTPUT, POSTROUTING]
        .iter()
        .any(|it| number == it)
        .then_some(())?;
    Some(Chain {
        table: text(attributes, NFTA_CHAIN_TABLE)?,
        name: text(attributes, NFTA_CHAIN_NAME)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(hook: Option<u32>) -> Vec<u8> {
        let mut bytes = vec![NFPROTO_BRIDGE, 0, 0, 0];
        bytes.extend(nested(NFTA_CHAIN_TABLE, b"filter\0"));
        bytes.extend(nested(NFTA_CHAIN_NAME, b"OUT\0"));
        if let Some(hook) = hook {
            let number = nested(NFTA_HOOK_HOOKNUM, &hook.to_be_bytes());
            bytes.extend(nested(0x8000 | NFTA_CHAIN_HOOK, &number));
        }
        bytes
    }

    #[test]
    fn only_what_leaves_by_a_bridge_counts() {
        let out = Some(Chain {
            table: "filter".to_owned(),
            name: "OUT".to_owned(),
        });
        for (hook, expected) in [
            (Some(0), &None),
            (Some(2), &None),
            (Some(3), &out),
            (Some(4), &out),
            (None, &None),
        ] {
            assert_eq!(&chain(&message(hook)), expected, "{hook:?}");
        }
        for length in 0..message(Some(3)).len() {
            // Cut anywhere: no panic.
            let _ = chain(&message(Some(3))[..length]);
        }
    }
}
