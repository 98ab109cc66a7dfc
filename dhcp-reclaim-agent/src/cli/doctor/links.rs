//! Bridges, their ports, and what passes them by.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
};

use aya::programs::{SchedClassifier, loaded_programs, tc::TcAttachType};
use futures::TryStreamExt as _;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVtap, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
    MacVtapMode, XdpAttached,
};

use super::{Chart, host::processes_with, netfilter};
use crate::{
    config::{Hook, LeaseQuery, Settings},
    core::{IfIndex, Port, Role, Vlan, Vlans},
    ports::{OWN_PREFIX, PortEvent, PortWatcher, VlanFiltering, local_addresses},
};

/// Programs of ours, by the first letters that the kernel keeps of their names.
const OURS: [&str; 4] = ["vm_ingress", "vm_egress", "xdp_ingress", "emit"];
const PORT: u16 = 67;

/// A link, as far as the agent's own reading of it does not say it.
#[derive(Clone, Debug, Default)]
struct Seen {
    ifindex: IfIndex,
    name: String,
    kind: String,
    up: bool,
    master: Option<IfIndex>,
    xdp: Option<u32>,
    passthru: bool,
}

/// What the agent would follow.
#[derive(Debug, Default)]
struct Followed {
    bridges: BTreeMap<IfIndex, String>,
    ports: Vec<Port>,
    filtering: BTreeMap<IfIndex, VlanFiltering>,
    vlans: BTreeMap<IfIndex, Vlans>,
}

/// Every Linux bridge of this namespace.
pub(super) fn bridges() -> Vec<String> {
    let all = block_on(links()).unwrap_or_default();
    let bridges = all.into_iter().filter(|link| link.kind == "bridge");
    bridges.map(|link| link.name).collect()
}

pub(super) fn look(settings: &Settings, chart: &mut Chart) {
    let all = match block_on(links()) {
        Ok(all) => all,
        Err(error) => {
            let text = format!("the links cannot be read: {error:#}");
            return chart.fail("links", text, "sudo dhcp-reclaim doctor");
        }
    };
    let followed = match block_on(follow(settings)) {
        Ok(followed) => followed,
        Err(error) => {
            let text = format!("the ports cannot be read: {error:#}");
            return chart.fail("links", text, "sudo dhcp-reclaim doctor");
        }
    };
    if settings.bridges.is_empty() {
        let mend = "ip link add br0 type bridge && ip link set br0 up";
        chart.fail("bridge", "there is no bridge here", mend);
    }
    for name in &settings.bridges {
        bridge(name, &all, &followed, chart);
    }
    for port in &followed.ports {
        in_front(port, &all, settings.hook, chart);
    }
    for (ifindex, filtering) in &followed.filtering {
        vlans(*ifindex, *filtering, &followed, chart);
    }
    for link in &all {
        passes_by(link, &all, &followed, chart);
    }
    let user = processes_with("vhost-user");
    if !user.is_empty() {
        chart.warn(
            "vhost-user",
            format!(
                "{} has a vhost-user port: its frames pass no link of the kernel",
                user.join(", ")
            ),
            "give such VMs a tap on the bridge: -netdev tap, or <interface type='bridge'>",
        );
    }
    netfilter::look(chart);
    for (ifindex, name) in &followed.bridges {
        port_67(*ifindex, name, settings.leasequery, chart);
    }
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

async fn links() -> anyhow::Result<Vec<Seen>> {
    let (connection, handle, _messages) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let rows: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    connection.abort();
    Ok(rows.iter().map(seen).collect())
}

fn seen(row: &LinkMessage) -> Seen {
    let mut seen = Seen {
        ifindex: row.header.index,
        up: row.header.flags.contains(LinkFlags::Up),
        ..Seen::default()
    };
    for attribute in &row.attributes {
        match attribute {
            LinkAttribute::IfName(name) => seen.name.clone_from(name),
            LinkAttribute::Controller(master) => seen.master = Some(*master),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => seen.kind = kind_name(kind),
                        LinkInfo::Data(InfoData::MacVtap(data)) => {
                            let passthru = InfoMacVtap::Mode(MacVtapMode::Passthrough);
                            seen.passthru |= data.contains(&passthru);
                        }
                        _ => {}
                    }
                }
            }
            LinkAttribute::Xdp(xdp) => seen.xdp = xdp_program(xdp),
            _ => {}
        }
    }
    seen
}

fn kind_name(kind: &InfoKind) -> String {
    match kind {
        InfoKind::Bridge => "bridge".to_owned(),
        InfoKind::Tun => "tun".to_owned(),
        InfoKind::Veth => "veth".to_owned(),
        InfoKind::MacVtap => "macvtap".to_owned(),
        InfoKind::Other(name) => name.clone(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn xdp_program(xdp: &[LinkXdp]) -> Option<u32> {
    let attached = xdp
        .iter()
        .any(|it| matches!(it, LinkXdp::Attached(how) if *how != XdpAttached::None));
    let id = xdp.iter().find_map(|it| match it {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) => Some(*id),
        _ => None,
    });
    attached.then(|| id.unwrap_or(0))
}

async fn follow(settings: &Settings) -> anyhow::Result<Followed> {
    let (events, _watcher) = PortWatcher::start(settings.port_rules()).await?;
    let mut followed = Followed::default();
    for event in events {
        match event {
            PortEvent::BridgeUp { ifindex, name, .. } => {
                followed.bridges.insert(ifindex, name);
            }
            PortEvent::BridgeVlans { ifindex, filtering } => {
                followed.filtering.insert(ifindex, filtering);
            }
            PortEvent::Vlans { ifindex, vlans } => {
                followed.vlans.insert(ifindex, vlans);
            }
            PortEvent::PortUp(port) => followed.ports.push(port),
            PortEvent::BridgeMac { .. }
            | PortEvent::BridgeDown { .. }
            | PortEvent::PortDown { .. }
            | PortEvent::Resynced => {}
        }
    }
    Ok(followed)
}

fn bridge(name: &str, all: &[Seen], followed: &Followed, chart: &mut Chart) {
    let Some(link) = all.iter().find(|link| link.name == name) else {
        let here = all.iter().filter(|link| link.kind == "bridge");
        let here: Vec<&str> = here.map(|link| link.name.as_str()).collect();
        return chart.warn(
            "bridge",
            format!("{name} is not there: an agent would wait for it"),
            match &here[..] {
                [] => format!("ip link add {name} type bridge && ip link set {name} up"),
                here => format!(
                    "name one that is here: --bridge {}",
                    here.join(" --bridge ")
                ),
            },
        );
    };
    if link.kind != "bridge" {
        let kind = if link.kind.is_empty() {
            "a physical link"
        } else {
            &link.kind
        };
        let mend = match kind {
            "openvswitch" => "OVS's own datapath is not followed: put the VMs on a Linux bridge",
            _ => "name a Linux bridge: ip -brief link show type bridge",
        };
        let text = format!("{name} is no Linux bridge, but {kind}: it has no ports to watch");
        return chart.fail("bridge", text, mend);
    }
    if !link.up {
        return chart.fail(
            "bridge",
            format!("{name} is down: nothing passes it"),
            format!("ip link set {name} up"),
        );
    }
    let of = |role: Role| {
        let ports = followed.ports.iter();
        let ports = ports.filter(|port| port.segment == link.ifindex && port.role == role);
        ports.map(|port| port.name.as_str()).collect::<Vec<_>>()
    };
    let mut text = format!("{name}: VMs at {}", some(&of(Role::Vm)));
    text.push_str(&format!("; uplinks {}", some(&of(Role::Uplink))));
    if !of(Role::Aside).is_empty() {
        let aside = some(&of(Role::Aside));
        text.push_str(&format!("; for VMs that move there only (--port) {aside}"));
    }
    chart.ok("bridge", text);
}

/// The first few, and how many more.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 6;
    match names {
        [] => "none".to_owned(),
        few if few.len() <= SHOWN => few.join(" "),
        many => format!(
            "{} and {} more",
            many[..SHOWN].join(" "),
            many.len() - SHOWN
        ),
    }
}

/// What sees a port's frames before our programs do.
fn in_front(port: &Port, all: &[Seen], hook: Hook, chart: &mut Chart) {
    let name = &port.name;
    let link = all.iter().find(|link| link.ifindex == port.ifindex);
    if let Some(id) = link.and_then(|link| link.xdp)
        && !is_ours(id)
        && hook != Hook::Xdp
    {
        chart.warn(
            "port",
            format!(
                "{name} has an XDP program (id {id}): what that drops or redirects is not seen"
            ),
            format!("ip link set dev {name} xdp off"),
        );
    }
    let Ok((_, programs)) = SchedClassifier::query_tcx(name, TcAttachType::Ingress) else {
        // No tcx, or no right to look.
        return;
    };
    let names: Vec<&str> = programs
        .iter()
        .map(|it| it.name_as_str().unwrap_or("?"))
        .collect();
    let ours = names.iter().position(|name| OURS.contains(name));
    if let Some(before) = ours.filter(|at| *at > 0) {
        chart.warn(
            "port",
            format!(
                "{name} has {} in front of ours at tcx: what that keeps to itself is not seen",
                names[..before].join(", ")
            ),
            "systemctl restart dhcp-reclaim: who attaches last may be the first",
        );
    }
}

fn is_ours(id: u32) -> bool {
    let program = loaded_programs().flatten().find(|it| it.id() == id);
    program.is_some_and(|it| it.name_as_str().is_some_and(|name| OURS.contains(&name)))
}

fn vlans(bridge: IfIndex, filtering: VlanFiltering, followed: &Followed, chart: &mut Chart) {
    let Some(name) = followed.bridges.get(&bridge) else {
        return;
    };
    let ports: Vec<(&Port, &Vlans)> = followed
        .ports
        .iter()
        .filter(|port| port.segment == bridge)
        .filter_map(|port| Some((port, followed.vlans.get(&port.ifindex)?)))
        .collect();
    let tunnel = ports.iter().find(|(_, vlans)| vlans.tunnel);
    match (filtering, tunnel) {
        (VlanFiltering::Off, _) => return,
        (VlanFiltering::Service, _) => {
            return chart.fail(
                "vlan",
                format!("{name} filters VLANs by 802.1ad tags, which are not followed: nothing is released"),
                format!("ip link set {name} type bridge vlan_protocol 802.1Q"),
            );
        }
        (VlanFiltering::Customer, Some((port, _))) => {
            return chart.fail(
                "vlan",
                format!(
                    "{} has vlan_tunnel, which is not followed: nothing on {name} is released",
                    port.name
                ),
                format!("bridge link set dev {} vlan_tunnel off", port.name),
            );
        }
        (VlanFiltering::Customer, None) => {}
    }
    let own = followed.vlans.get(&bridge).cloned().unwrap_or_default();
    let vms = ports.iter().filter(|(port, _)| port.role == Role::Vm);
    let needed: BTreeSet<Vlan> = vms
        .flat_map(|(_, vlans)| vlans.members.iter().map(|(first, ..)| *first))
        .collect();
    let lacks: Vec<Vlan> = needed
        .into_iter()
        .filter(|vlan| own.tag(*vlan).is_none())
        .collect();
    if lacks.is_empty() {
        return chart.ok(
            "vlan",
            format!("{name} filters VLANs, and is a member of those of its VMs"),
        );
    }
    let mends = lacks
        .iter()
        .map(|vlan| format!("bridge vlan add vid {vlan} dev {name} self"));
    let mends: Vec<String> = mends.collect();
    chart.warn(
        "vlan",
        format!(
            "{name} itself is no member of VLAN {}: nobody can be asked there",
            numbers(&lacks)
        ),
        mends.join(" && "),
    );
}

fn numbers(vlans: &[Vlan]) -> String {
    let words: Vec<String> = vlans.iter().map(Vlan::to_string).collect();
    words.join(", ")
}

/// Links whose VMs the agent does not see.
fn passes_by(link: &Seen, all: &[Seen], followed: &Followed, chart: &mut Chart) {
    let name = &link.name;
    let master = link
        .master
        .and_then(|master| all.iter().find(|it| it.ifindex == master));
    let is_port = followed
        .ports
        .iter()
        .any(|port| port.ifindex == link.ifindex);
    match link.kind.as_str() {
        "macvtap" | "ipvtap" if !is_port => {
            let mode = if link.passthru {
                " in passthrough mode"
            } else {
                ""
            };
            chart.warn(
                link_check(link),
                format!(
                    "{name} is a {}{mode}: its VM's frames go past every bridge",
                    link.kind
                ),
                "use a tap on the bridge instead: <source bridge='br0'/>, not type='direct'",
            );
        }
        "tun" if !is_port && master.is_none() && is_tap(name) && !name.starts_with(OWN_PREFIX) => {
            chart.warn(
                link_check(link),
                format!(
                    "{name} is a tap and no bridge's port: if a VM is behind it, it is not seen"
                ),
                format!("ip link set {name} master BRIDGE"),
            );
        }
        _ => {}
    }
    if master.is_some_and(|master| master.kind == "openvswitch") {
        chart.warn(
            "ovs",
            format!("{name} is a port of an OVS datapath: its VM is not seen"),
            "put the VMs on a Linux bridge, and that on the OVS port, which is its --uplink",
        );
    }
    let virtual_functions =
        fs::read_to_string(format!("/sys/class/net/{name}/device/sriov_numvfs"));
    let count = virtual_functions
        .ok()
        .and_then(|count| count.trim().parse::<u32>().ok());
    if let Some(count) = count.filter(|count| *count > 0) {
        chart.warn(
            "sr-iov",
            format!("{name} has {count} virtual functions: what VMs send by those passes no link here"),
            "leases of VMs with a function of their own end by themselves; use a tap where it matters",
        );
    }
}

fn link_check(link: &Seen) -> &'static str {
    match link.kind.as_str() {
        "tun" => "tap",
        "ipvtap" => "ipvtap",
        _ => "macvtap",
    }
}

/// IFF_TAP, in what the driver shows.
fn is_tap(name: &str) -> bool {
    let flags = fs::read_to_string(format!("/sys/class/net/{name}/tun_flags")).unwrap_or_default();
    let flags = flags.trim().trim_start_matches("0x");
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 2 != 0)
}

fn port_67(bridge: IfIndex, name: &str, leasequery: LeaseQuery, chart: &mut Chart) {
    if leasequery == LeaseQuery::Off {
        return chart.ok("leasequery", "off");
    }
    let addresses = block_on(async { Ok(local_addresses(bridge).await?) }).unwrap_or_default();
    let Some(address) = addresses.first() else {
        let text =
            format!("{name} has no address to ask servers from, so outcomes stay unverified");
        return chart.ok("leasequery", text);
    };
    let sockets = fs::read_to_string("/proc/net/udp").unwrap_or_default();
    if taken(&sockets, *address) {
        return chart.warn(
            "leasequery",
            format!("port {PORT} of {address} is taken by a server or relay here: nobody is asked what became of a RELEASE"),
            "none is needed; --leasequery off says that it is meant",
        );
    }
    chart.ok("leasequery", format!("servers are asked from {address}"));
}

/// Whether somebody has the port, at this address or at all: `0: 00000000:0043 ...`, in host order.
fn taken(sockets: &str, address: Ipv4Addr) -> bool {
    sockets
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .any(|local| {
            let Some((ip, port)) = local.split_once(':') else {
                return false;
            };
            let ip = u32::from_str_radix(ip, 16).map(|ip| Ipv4Addr::from(ip.to_ne_bytes()));
            let here = ip.is_ok_and(|ip| ip.is_unspecified() || ip == address);
            here && u16::from_str_radix(port, 16) == Ok(PORT)
        })
}

#[cfg(test)]
mod tests {
    use super::{super::Health, *};

    const BR0: IfIndex = 4;

    fn link(name: &str, kind: &str) -> Seen {
        Seen {
            ifindex: 9,
            name: name.to_owned(),
            kind: kind.to_owned(),
            up: true,
            ..Seen::default()
        }
    }

    fn one(look: impl FnOnce(&mut Chart)) -> (&'static str, Health, String) {
        let mut chart = Chart::default();
        look(&mut chart);
        let [finding] = &chart.0[..] else {
            panic!("{chart:?}");
        };
        let mend = finding.mend.clone().unwrap_or_default();
        (finding.check, finding.health, mend)
    }

    #[test]
    fn a_named_bridge_must_be_one() {
        let followed = Followed::default();
        let all = [
            link("br0", "bridge"),
            link("ovs0", "openvswitch"),
            link("eth0", ""),
        ];
        for (name, health, mend) in [
            ("br0", Health::Ok, ""),
            ("br7", Health::Warn, "name one that is here: --bridge br0"),
            (
                "ovs0",
                Health::Fail,
                "OVS's own datapath is not followed: put the VMs on a Linux bridge",
            ),
            (
                "eth0",
                Health::Fail,
                "name a Linux bridge: ip -brief link show type bridge",
            ),
        ] {
            let found = one(|chart| bridge(name, &all, &followed, chart));
            assert_eq!(found, ("bridge", health, mend.to_owned()), "{name}");
        }
        let down = [Seen {
            up: false,
            ..link("br0", "bridge")
        }];
        let found = one(|chart| bridge("br0", &down, &followed, chart));
        assert_eq!(
            found,
            ("bridge", Health::Fail, "ip link set br0 up".to_owned())
        );
    }

    #[test]
    fn a_port_of_an_ovs_datapath_is_not_seen() {
        let system = Seen {
            ifindex: 3,
            ..link("ovs-system", "openvswitch")
        };
        let port = Seen {
            master: Some(3),
            ..link("vnet0", "veth")
        };
        let all = [system, port.clone()];
        let found = one(|chart| passes_by(&port, &all, &Followed::default(), chart));
        assert_eq!((found.0, found.1), ("ovs", Health::Warn));
    }

    #[test]
    fn a_bridge_that_filters_vlans_must_be_a_member_itself() {
        let port = Port {
            ifindex: 9,
            name: "vnet0".to_owned(),
            segment: BR0,
            role: Role::Vm,
        };
        let of = |vlan: Vlan, tunnel| Vlans {
            pvid: vlan,
            members: vec![(vlan, vlan, true)],
            tunnel,
        };
        let followed = |own: Vlan, tunnel| Followed {
            bridges: BTreeMap::from([(BR0, "br0".to_owned())]),
            ports: vec![port.clone()],
            vlans: BTreeMap::from([(BR0, of(own, false)), (9, of(7, tunnel))]),
            ..Followed::default()
        };
        let customer = VlanFiltering::Customer;
        for (filtering, own, tunnel, health, mend) in [
            (customer, 7, false, Health::Ok, ""),
            (
                customer,
                1,
                false,
                Health::Warn,
                "bridge vlan add vid 7 dev br0 self",
            ),
            (
                customer,
                7,
                true,
                Health::Fail,
                "bridge link set dev vnet0 vlan_tunnel off",
            ),
            (
                VlanFiltering::Service,
                7,
                false,
                Health::Fail,
                "ip link set br0 type bridge vlan_protocol 802.1Q",
            ),
        ] {
            let found = one(|chart| vlans(BR0, filtering, &followed(own, tunnel), chart));
            assert_eq!(found, ("vlan", health, mend.to_owned()));
        }
    }

    #[test]
    fn whoever_has_port_67_is_seen() {
        let me = Ipv4Addr::new(10, 67, 0, 1);
        let local = |ip: Ipv4Addr, port: &str| {
            let ip = u32::from_ne_bytes(ip.octets());
            format!("  sl  local_address rem_address\n   0: {ip:08X}:{port} 00000000:0000 07\n")
        };
        assert!(taken(&local(me, "0043"), me));
        assert!(taken(&local(Ipv4Addr::UNSPECIFIED, "0043"), me));
        assert!(!taken(&local(Ipv4Addr::new(10, 67, 0, 2), "0043"), me));
        assert!(!taken(&local(me, "0044"), me));
    }
}
