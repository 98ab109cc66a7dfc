//! Which links are ports of our bridges: pure, from link messages to port events.

use std::collections::{BTreeMap, BTreeSet};

use super::Glob;
use crate::core::{IfIndex, MacAddr, Port, PortLoss, Role, Vlans};

/// Links of our own carry this prefix; they are never ports.
pub const OWN_PREFIX: &str = "dreclaim";

/// What changed about the bridges and their ports, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortEvent {
    /// A bridge of ours is there; its ports follow.
    BridgeUp {
        ifindex: IfIndex,
        name: String,
        mac: MacAddr,
    },
    /// It has another Ethernet address: it takes that of a port unless one was set.
    BridgeMac { ifindex: IfIndex, mac: MacAddr },
    /// Whether it filters VLANs (`vlan_filtering`). Told after `BridgeUp` if it does, and when that
    /// changes.
    BridgeVlans {
        ifindex: IfIndex,
        filtering: VlanFiltering,
    },
    /// The VLANs of a port, or of a bridge itself, whether or not the bridge filters them.
    Vlans { ifindex: IfIndex, vlans: Vlans },
    /// It is gone; so are its ports, each with a `PortDown` before this.
    BridgeDown { ifindex: IfIndex, name: String },
    /// A port is there, has its carrier back, or has another name. The same port may come up again
    /// without having gone down.
    PortUp(Port),
    /// A port lost its carrier, or is no longer there. After `CarrierLost` the link still exists;
    /// `Deleted` or `Detached` may follow.
    PortDown { ifindex: IfIndex, loss: PortLoss },
    /// The kernel had dropped messages; the differences come before this.
    Resynced,
}

/// Which bridges are followed, and which of their links count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortRules {
    /// Bridges, by name.
    pub bridges: Vec<String>,
    /// VM ports; empty is all. A pattern limits what counts as a VM's port, a whole name also makes
    /// it one, whatever its kind.
    pub ports: Vec<Glob>,
    /// Ports that lead to other hosts, besides those whose kind says so. Stronger than `ports`.
    pub uplinks: Vec<Glob>,
}

/// Whether a bridge tells VLANs apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VlanFiltering {
    #[default]
    Off,
    /// By 802.1Q tags.
    Customer,
    /// By 802.1ad tags: those of 802.1Q are payload.
    Service,
}

/// What a link message tells of one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub ifindex: IfIndex,
    pub name: String,
    pub master: Option<IfIndex>,
    /// IFLA_INFO_KIND; physical devices have none.
    pub kind: Option<String>,
    /// A bus device is behind it (IFLA_PARENT_DEV_NAME, from Linux 5.14).
    pub on_bus: bool,
    /// IFF_UP: somebody wants it up.
    pub admin_up: bool,
    /// IFLA_CARRIER.
    pub carrier: bool,
    pub mac: MacAddr,
    /// A bridge with `vlan_filtering 1` (IFLA_BR_VLAN_FILTERING).
    pub vlan_filtering: VlanFiltering,
}

/// One link message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkChange {
    Set(Link),
    Removed(IfIndex),
    Vlans { ifindex: IfIndex, vlans: Vlans },
}

impl PortRules {
    /// The role of a link that is a port of one of the bridges; `None` for the agent's own.
    pub fn role(&self, link: &Link) -> Option<Role> {
        if link.name.starts_with(OWN_PREFIX) {
            return None;
        }
        let name = link.name.as_str();
        if self.uplinks.iter().any(|glob| glob.matches(name)) {
            return Some(Role::Uplink);
        }
        if self
            .ports
            .iter()
            .any(|glob| glob.is_literal() && glob.matches(name))
        {
            return Some(Role::Vm);
        }
        match role_of_kind(link) {
            // What comes from elsewhere is watched even if only some VMs are asked for: a VM that
            // moved away shows itself there.
            Role::Uplink => Some(Role::Uplink),
            Role::Vm if self.ports.is_empty() => Some(Role::Vm),
            Role::Vm if self.ports.iter().any(|glob| glob.matches(name)) => Some(Role::Vm),
            // A VM may be plugged in there.
            Role::Vm | Role::Aside => Some(Role::Aside),
        }
    }
}

/// Anything unknown is a VM's: it is then believed about itself only.
fn role_of_kind(link: &Link) -> Role {
    let Some(kind) = link.kind.as_deref() else {
        return Role::Uplink;
    };
    match kind {
        "tun" | "veth" | "netkit" | "macvtap" | "ipvtap" => Role::Vm,
        "bond" | "team" | "vlan" | "vxlan" | "geneve" | "macsec" | "macvlan" | "ipvlan" | "hsr"
        | "batadv" | "bareudp" | "dsa" | "ipoib" | "amt" | "l2tp_eth" | "erspan" | "ip6erspan" => {
            Role::Uplink
        }
        _ if kind.starts_with("gre") || kind.starts_with("ip6gre") => Role::Uplink,
        _ if link.on_bus => Role::Uplink,
        _ => Role::Vm,
    }
}

/// All links of the namespace, and what has been told about them.
#[derive(Debug, Default)]
pub struct Links {
    rules: PortRules,
    links: BTreeMap<IfIndex, Link>,
    bridges: BTreeMap<IfIndex, Bridge>,
    ports: BTreeMap<IfIndex, Tracked>,
    /// Ports that have left their bridge, and are still there: Proxmox and Incus take a VM's port off
    /// before they delete it, and only its end says that the VM has none any more.
    detached: BTreeSet<IfIndex>,
    /// Of whatever is, or may become, a port or bridge of ours.
    vlans: BTreeMap<IfIndex, Vlans>,
    /// A bridge that filters VLANs came or changed: not every change of VLANs is announced.
    vlans_wanted: bool,
    /// While a dump runs: the links that it or a message showed.
    dump: Option<BTreeSet<IfIndex>>,
}

#[derive(Debug)]
struct Bridge {
    name: String,
    mac: MacAddr,
    vlan_filtering: VlanFiltering,
}

#[derive(Debug)]
struct Tracked {
    port: Port,
    /// It had a carrier when last that could be told.
    carrier: bool,
    /// `CarrierLost` was told.
    lost: bool,
}

impl Links {
    pub fn new(rules: PortRules) -> Self {
        Self {
            rules,
            ..Self::default()
        }
    }

    /// A dump of all links begins; messages may come between its rows.
    pub fn begin_dump(&mut self) {
        self.dump = Some(BTreeSet::new());
    }

    /// The dump is complete: what it did not show is gone.
    pub fn end_dump(&mut self) -> Vec<PortEvent> {
        let Some(seen) = self.dump.take() else {
            return Vec::new();
        };
        let gone: Vec<IfIndex> = self
            .links
            .keys()
            .filter(|ifindex| !seen.contains(ifindex))
            .copied()
            .collect();
        let mut events = Vec::new();
        for ifindex in gone {
            self.remove(ifindex, &mut events);
        }
        events
    }

    pub fn apply(&mut self, change: LinkChange) -> Vec<PortEvent> {
        let mut events = Vec::new();
        match change {
            LinkChange::Set(link) => self.set(link, &mut events),
            LinkChange::Removed(ifindex) => {
                if let Some(seen) = &mut self.dump {
                    seen.remove(&ifindex);
                }
                self.remove(ifindex, &mut events);
            }
            LinkChange::Vlans { ifindex, vlans } => {
                let ours = self.ports.contains_key(&ifindex) || self.bridges.contains_key(&ifindex);
                if self.vlans.get(&ifindex) != Some(&vlans) {
                    self.vlans.insert(ifindex, vlans.clone());
                    if ours {
                        events.push(PortEvent::Vlans { ifindex, vlans });
                    }
                }
            }
        }
        events
    }

    /// Whether the VLANs should be read anew; says so once.
    pub fn want_vlans(&mut self) -> bool {
        std::mem::take(&mut self.vlans_wanted)
    }

    fn tell_vlans(&self, ifindex: IfIndex, events: &mut Vec<PortEvent>) {
        if let Some(vlans) = self.vlans.get(&ifindex).cloned() {
            events.push(PortEvent::Vlans { ifindex, vlans });
        }
    }

    fn set(&mut self, link: Link, events: &mut Vec<PortEvent>) {
        let ifindex = link.ifindex;
        if let Some(seen) = &mut self.dump {
            seen.insert(ifindex);
            // Messages may be missing, a deletion among them: another face under a known index is
            // another link.
            if self.ports.contains_key(&ifindex)
                && self
                    .links
                    .get(&ifindex)
                    .is_some_and(|known| !same_face(known, &link))
            {
                self.remove(ifindex, events);
            }
        }
        self.links.insert(ifindex, link);
        self.update_bridge(ifindex, events);
        self.update_port(ifindex, events);
    }

    fn remove(&mut self, ifindex: IfIndex, events: &mut Vec<PortEvent>) {
        self.links.remove(&ifindex);
        self.vlans.remove(&ifindex);
        self.bridge_down(ifindex, events);
        let was_detached = self.detached.remove(&ifindex);
        if self.ports.remove(&ifindex).is_some() || was_detached {
            events.push(PortEvent::PortDown {
                ifindex,
                loss: PortLoss::Deleted,
            });
        }
    }

    fn update_bridge(&mut self, ifindex: IfIndex, events: &mut Vec<PortEvent>) {
        let Some(link) = self.links.get(&ifindex) else {
            return;
        };
        let (name, mac, filtering) = (link.name.clone(), link.mac, link.vlan_filtering);
        if let Some(bridge) = self.bridges.get_mut(&ifindex) {
            if bridge.name == name {
                self.vlans_wanted |= filtering != VlanFiltering::Off;
                if bridge.mac != mac {
                    bridge.mac = mac;
                    events.push(PortEvent::BridgeMac { ifindex, mac });
                }
                if bridge.vlan_filtering != filtering {
                    bridge.vlan_filtering = filtering;
                    events.push(PortEvent::BridgeVlans { ifindex, filtering });
                }
                return;
            }
            self.bridge_down(ifindex, events);
        }
        if !self.rules.bridges.contains(&name) {
            return;
        }
        // Names are unique: whoever had it has lost it, though the message may still be on its way.
        let before = self.bridges.iter().find(|(_, bridge)| bridge.name == name);
        if let Some(before) = before.map(|(ifindex, _)| *ifindex) {
            self.bridge_down(before, events);
        }
        self.bridges.insert(
            ifindex,
            Bridge {
                name: name.clone(),
                mac,
                vlan_filtering: filtering,
            },
        );
        events.push(PortEvent::BridgeUp { ifindex, name, mac });
        if filtering != VlanFiltering::Off {
            self.vlans_wanted = true;
            events.push(PortEvent::BridgeVlans { ifindex, filtering });
        }
        self.tell_vlans(ifindex, events);
        let slaves: Vec<IfIndex> = self
            .links
            .values()
            .filter(|link| link.master == Some(ifindex))
            .map(|link| link.ifindex)
            .collect();
        for slave in slaves {
            self.update_port(slave, events);
        }
    }

    fn bridge_down(&mut self, ifindex: IfIndex, events: &mut Vec<PortEvent>) {
        let Some(bridge) = self.bridges.remove(&ifindex) else {
            return;
        };
        let orphans: Vec<IfIndex> = self
            .ports
            .values()
            .filter(|tracked| tracked.port.segment == ifindex)
            .map(|tracked| tracked.port.ifindex)
            .collect();
        for orphan in orphans {
            self.ports.remove(&orphan);
            self.detached.insert(orphan);
            events.push(PortEvent::PortDown {
                ifindex: orphan,
                loss: PortLoss::Detached,
            });
        }
        events.push(PortEvent::BridgeDown {
            ifindex,
            name: bridge.name,
        });
    }

    fn update_port(&mut self, ifindex: IfIndex, events: &mut Vec<PortEvent>) {
        let Some(link) = self.links.get(&ifindex) else {
            return;
        };
        let wanted = link
            .master
            .filter(|master| self.bridges.contains_key(master))
            .zip(self.rules.role(link))
            .map(|(segment, role)| Port {
                ifindex,
                name: link.name.clone(),
                segment,
                role,
            });

        let same_place = |tracked: &Tracked, port: &Port| {
            tracked.port.segment == port.segment && tracked.port.role == port.role
        };
        match (self.ports.get_mut(&ifindex), wanted) {
            (None, None) => {}
            (None, Some(port)) => {
                // Up at first sight, carrier or not: it is watched before its guest can ask.
                let tracked = Tracked::new(port.clone(), link);
                self.ports.insert(ifindex, tracked);
                self.detached.remove(&ifindex);
                self.tell_vlans(ifindex, events);
                events.push(PortEvent::PortUp(port));
            }
            (Some(_), None) => {
                self.ports.remove(&ifindex);
                self.detached.insert(ifindex);
                // Of the bridge that it has left.
                self.vlans.remove(&ifindex);
                events.push(PortEvent::PortDown {
                    ifindex,
                    loss: PortLoss::Detached,
                });
            }
            (Some(tracked), Some(port)) if same_place(tracked, &port) => {
                let renamed = tracked.port.name != port.name;
                tracked.port = port;
                let change = tracked.carrier_change(link);
                if change.is_none() && renamed && !tracked.lost {
                    events.push(PortEvent::PortUp(tracked.port.clone()));
                }
                events.extend(change);
            }
            (Some(tracked), Some(port)) => {
                *tracked = Tracked::new(port.clone(), link);
                events.push(PortEvent::PortDown {
                    ifindex,
                    loss: PortLoss::Detached,
                });
                events.push(PortEvent::PortUp(port));
            }
        }
    }
}

impl Tracked {
    fn new(port: Port, link: &Link) -> Self {
        // The carrier of a link that is down is whatever its driver left there.
        Self {
            port,
            carrier: link.admin_up && link.carrier,
            lost: false,
        }
    }

    fn carrier_change(&mut self, link: &Link) -> Option<PortEvent> {
        // An uplink without carrier is still the segment's way to other hosts, and no VM's.
        if self.port.role != Role::Vm {
            return None;
        }
        // Whoever sets our end down takes a veth's carrier with it: that says nothing about the VM,
        // and a tap's carrier is not reported while it is down. Both speak once it is up again.
        if !link.admin_up || link.carrier == self.carrier {
            return None;
        }
        self.carrier = link.carrier;
        if !link.carrier {
            self.lost = true;
            let ifindex = self.port.ifindex;
            // A tap has lost whoever held it open; what is behind another link may only have set its
            // end down, as a container's network scripts do.
            let loss = match link.kind.as_deref() {
                Some("tun") => PortLoss::CarrierLost,
                _ => PortLoss::LinkDown,
            };
            return Some(PortEvent::PortDown { ifindex, loss });
        }
        // The first carrier of a port that was up without one is no news.
        std::mem::take(&mut self.lost).then(|| PortEvent::PortUp(self.port.clone()))
    }
}

fn same_face(known: &Link, link: &Link) -> bool {
    known.name == link.name && known.kind == link.kind && known.mac == link.mac
}

#[cfg(test)]
mod tests {
    use super::*;

    const BR0: IfIndex = 4;
    const BR1: IfIndex = 5;
    const TAP: IfIndex = 10;

    fn mac(last: u8) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, last])
    }

    fn link(ifindex: IfIndex, name: &str, kind: Option<&str>) -> Link {
        Link {
            ifindex,
            name: name.to_owned(),
            master: None,
            kind: kind.map(str::to_owned),
            on_bus: false,
            admin_up: true,
            carrier: true,
            mac: mac(u8::try_from(ifindex).unwrap()),
            vlan_filtering: VlanFiltering::Off,
        }
    }

    fn bridge(ifindex: IfIndex, name: &str) -> Link {
        link(ifindex, name, Some("bridge"))
    }

    fn tap(name: &str) -> Link {
        Link {
            master: Some(BR0),
            ..link(TAP, name, Some("tun"))
        }
    }

    fn globs(patterns: &[&str]) -> Vec<Glob> {
        patterns
            .iter()
            .map(|pattern| pattern.parse().unwrap())
            .collect()
    }

    fn rules(ports: &[&str], uplinks: &[&str]) -> PortRules {
        PortRules {
            bridges: vec!["br0".to_owned(), "br1".to_owned()],
            ports: globs(ports),
            uplinks: globs(uplinks),
        }
    }

    fn up(name: &str, segment: IfIndex, role: Role) -> PortEvent {
        PortEvent::PortUp(Port {
            ifindex: TAP,
            name: name.to_owned(),
            segment,
            role,
        })
    }

    fn down(loss: PortLoss) -> PortEvent {
        PortEvent::PortDown { ifindex: TAP, loss }
    }

    fn bridge_up(ifindex: IfIndex, name: &str) -> PortEvent {
        let mac = mac(u8::try_from(ifindex).unwrap());
        PortEvent::BridgeUp {
            ifindex,
            name: name.to_owned(),
            mac,
        }
    }

    /// A bridge with one tap, all of it told.
    fn running() -> Links {
        let mut links = Links::new(rules(&[], &[]));
        assert_eq!(
            links.apply(LinkChange::Set(bridge(BR0, "br0"))),
            [bridge_up(BR0, "br0")]
        );
        assert_eq!(
            links.apply(LinkChange::Set(tap("tap0"))),
            [up("tap0", BR0, Role::Vm)]
        );
        links
    }

    fn set(links: &mut Links, link: Link) -> Vec<PortEvent> {
        links.apply(LinkChange::Set(link))
    }

    #[test]
    fn roles() {
        let all = rules(&[], &[]);
        let some = rules(&["vnet*", "eth7"], &["vnet-up*"]);
        let on_bus = Link {
            on_bus: true,
            ..link(1, "sim0", Some("netdevsim"))
        };
        assert_eq!(all.role(&on_bus), Some(Role::Uplink));
        for (name, kind, of_all, of_some) in [
            ("tap0", Some("tun"), Some(Role::Vm), Some(Role::Aside)),
            ("vnet0", Some("tun"), Some(Role::Vm), Some(Role::Vm)),
            ("vnet1", Some("veth"), Some(Role::Vm), Some(Role::Vm)),
            ("vnet-up0", Some("veth"), Some(Role::Vm), Some(Role::Uplink)),
            ("mt0", Some("macvtap"), Some(Role::Vm), Some(Role::Aside)),
            (
                "odd0",
                Some("unheard-of"),
                Some(Role::Vm),
                Some(Role::Aside),
            ),
            ("eth0", None, Some(Role::Uplink), Some(Role::Uplink)),
            // Named in full: a VM's, though it is a physical device.
            ("eth7", None, Some(Role::Uplink), Some(Role::Vm)),
            // A pattern does not do that.
            (
                "vnet9",
                Some("bond"),
                Some(Role::Uplink),
                Some(Role::Uplink),
            ),
            (
                "team0",
                Some("team"),
                Some(Role::Uplink),
                Some(Role::Uplink),
            ),
            (
                "eth0.7",
                Some("vlan"),
                Some(Role::Uplink),
                Some(Role::Uplink),
            ),
            ("vx7", Some("vxlan"), Some(Role::Uplink), Some(Role::Uplink)),
            (
                "gen0",
                Some("geneve"),
                Some(Role::Uplink),
                Some(Role::Uplink),
            ),
            (
                "gre0",
                Some("gretap"),
                Some(Role::Uplink),
                Some(Role::Uplink),
            ),
            (
                "gre6",
                Some("ip6gretap"),
                Some(Role::Uplink),
                Some(Role::Uplink),
            ),
            ("dreclaim0", Some("veth"), None, None),
        ] {
            let link = link(1, name, kind);
            assert_eq!(all.role(&link), of_all, "{name}, all");
            assert_eq!(some.role(&link), of_some, "{name}, some");
        }
    }

    #[test]
    fn port_before_its_bridge() {
        let mut links = Links::new(rules(&[], &[]));
        assert_eq!(set(&mut links, tap("tap0")), []);
        assert_eq!(
            set(&mut links, bridge(BR0, "br0")),
            [bridge_up(BR0, "br0"), up("tap0", BR0, Role::Vm)]
        );
    }

    #[test]
    fn a_bridge_that_is_not_ours_is_left_alone() {
        let mut links = Links::new(rules(&[], &[]));
        assert_eq!(set(&mut links, bridge(BR0, "docker0")), []);
        assert_eq!(set(&mut links, tap("tap0")), []);
        assert_eq!(links.apply(LinkChange::Removed(TAP)), []);
    }

    #[test]
    fn deleted_and_detached_differ() {
        let mut links = running();
        assert_eq!(
            set(
                &mut links,
                Link {
                    master: None,
                    ..tap("tap0")
                }
            ),
            [down(PortLoss::Detached)]
        );
        assert_eq!(set(&mut links, tap("tap0")), [up("tap0", BR0, Role::Vm)]);
        assert_eq!(
            links.apply(LinkChange::Removed(TAP)),
            [down(PortLoss::Deleted)]
        );
        assert_eq!(links.apply(LinkChange::Removed(TAP)), []);
    }

    #[test]
    fn the_end_of_a_port_that_had_left_its_bridge_is_told() {
        let apart = Link {
            master: None,
            ..tap("tap0")
        };
        let mut links = running();
        set(&mut links, apart.clone());
        assert_eq!(set(&mut links, apart.clone()), []);
        assert_eq!(
            links.apply(LinkChange::Removed(TAP)),
            [down(PortLoss::Deleted)]
        );
        // The next one under its index was no port.
        assert_eq!(set(&mut links, apart), []);
        assert_eq!(links.apply(LinkChange::Removed(TAP)), []);
        // Nor does it matter how it came to have no bridge.
        let mut links = running();
        links.apply(LinkChange::Removed(BR0));
        assert_eq!(
            links.apply(LinkChange::Removed(TAP)),
            [down(PortLoss::Deleted)]
        );
    }

    #[test]
    fn bridge_deleted_and_made_again() {
        let mut links = running();
        let gone = PortEvent::BridgeDown {
            ifindex: BR0,
            name: "br0".to_owned(),
        };
        assert_eq!(
            links.apply(LinkChange::Removed(BR0)),
            [down(PortLoss::Detached), gone]
        );
        assert_eq!(set(&mut links, bridge(99, "br0")), [bridge_up(99, "br0")]);
        assert_eq!(
            set(
                &mut links,
                Link {
                    master: Some(99),
                    ..tap("tap0")
                }
            ),
            [up("tap0", 99, Role::Vm)]
        );
    }

    #[test]
    fn bridge_renamed_away_and_back() {
        let mut links = running();
        let gone = PortEvent::BridgeDown {
            ifindex: BR0,
            name: "br0".to_owned(),
        };
        assert_eq!(
            set(&mut links, bridge(BR0, "old0")),
            [down(PortLoss::Detached), gone]
        );
        assert_eq!(
            set(&mut links, bridge(BR0, "br0")),
            [bridge_up(BR0, "br0"), up("tap0", BR0, Role::Vm)]
        );
    }

    #[test]
    fn bridge_takes_the_mac_of_a_port() {
        let mut links = running();
        let changed = Link {
            mac: mac(77),
            ..bridge(BR0, "br0")
        };
        assert_eq!(
            set(&mut links, changed.clone()),
            [PortEvent::BridgeMac {
                ifindex: BR0,
                mac: mac(77)
            }]
        );
        assert_eq!(set(&mut links, changed), []);
    }

    #[test]
    fn bridge_begins_and_ends_to_filter_vlans() {
        let told = |filtering| PortEvent::BridgeVlans {
            ifindex: BR0,
            filtering,
        };
        let filtering = Link {
            vlan_filtering: VlanFiltering::Customer,
            ..bridge(BR0, "br0")
        };
        let mut links = running();
        let on = told(VlanFiltering::Customer);
        assert!(!links.want_vlans());
        assert_eq!(
            set(&mut links, filtering.clone()),
            std::slice::from_ref(&on)
        );
        assert!(links.want_vlans() && !links.want_vlans());
        assert_eq!(set(&mut links, filtering.clone()), []);
        assert_eq!(
            set(&mut links, bridge(BR0, "br0")),
            [told(VlanFiltering::Off)]
        );
        let mut links = Links::new(rules(&[], &[]));
        assert_eq!(set(&mut links, filtering), [bridge_up(BR0, "br0"), on]);
    }

    #[test]
    fn vlans_are_told_when_they_change_and_before_their_port() {
        let access = Vlans {
            pvid: 10,
            members: vec![(10, 10, true)],
            tunnel: false,
        };
        let change = |ifindex| LinkChange::Vlans {
            ifindex,
            vlans: access.clone(),
        };
        let told = PortEvent::Vlans {
            ifindex: TAP,
            vlans: access.clone(),
        };
        let mut links = running();
        assert_eq!(links.apply(change(77)), [], "nobody's");
        assert_eq!(links.apply(change(TAP)), std::slice::from_ref(&told));
        assert_eq!(links.apply(change(TAP)), []);
        // Of another bridge they say nothing.
        let free = Link {
            master: None,
            ..tap("tap0")
        };
        set(&mut links, free.clone());
        assert_eq!(set(&mut links, tap("tap0")), [up("tap0", BR0, Role::Vm)]);
        set(&mut links, free);
        assert_eq!(links.apply(change(TAP)), [], "before it is a port");
        assert_eq!(
            set(&mut links, tap("tap0")),
            [told, up("tap0", BR0, Role::Vm)]
        );
    }

    #[test]
    fn port_moves_to_another_bridge_of_ours() {
        let mut links = running();
        set(&mut links, bridge(BR1, "br1"));
        assert_eq!(
            set(
                &mut links,
                Link {
                    master: Some(BR1),
                    ..tap("tap0")
                }
            ),
            [down(PortLoss::Detached), up("tap0", BR1, Role::Vm)]
        );
    }

    #[test]
    fn rename_tells_the_new_name_and_role() {
        let mut links = Links::new(rules(&[], &["up*"]));
        set(&mut links, bridge(BR0, "br0"));
        set(&mut links, tap("tap0"));
        assert_eq!(set(&mut links, tap("tap1")), [up("tap1", BR0, Role::Vm)]);
        assert_eq!(
            set(&mut links, tap("up0")),
            [down(PortLoss::Detached), up("up0", BR0, Role::Uplink)]
        );
    }

    #[test]
    fn carrier_lost_is_a_change_not_a_state() {
        let mut links = Links::new(rules(&[], &[]));
        set(&mut links, bridge(BR0, "br0"));
        let without = Link {
            carrier: false,
            ..tap("tap0")
        };
        assert_eq!(
            set(&mut links, without.clone()),
            [up("tap0", BR0, Role::Vm)]
        );
        assert_eq!(set(&mut links, without.clone()), []);
        assert_eq!(set(&mut links, tap("tap0")), [], "first carrier");
        assert_eq!(
            set(&mut links, without.clone()),
            [down(PortLoss::CarrierLost)]
        );
        assert_eq!(set(&mut links, without), []);
        assert_eq!(set(&mut links, tap("tap0")), [up("tap0", BR0, Role::Vm)]);
    }

    #[test]
    fn deleted_after_carrier_lost_is_told_too() {
        let mut links = running();
        set(
            &mut links,
            Link {
                carrier: false,
                ..tap("tap0")
            },
        );
        assert_eq!(
            links.apply(LinkChange::Removed(TAP)),
            [down(PortLoss::Deleted)]
        );
    }

    #[test]
    fn our_end_set_down_by_hand_is_no_loss() {
        let mut links = running();
        let downed = Link {
            admin_up: false,
            carrier: false,
            ..tap("tap0")
        };
        assert_eq!(set(&mut links, downed), []);
        assert_eq!(set(&mut links, tap("tap0")), [], "up again with carrier");
        let downed = Link {
            admin_up: false,
            carrier: false,
            ..tap("tap0")
        };
        set(&mut links, downed);
        assert_eq!(
            set(
                &mut links,
                Link {
                    carrier: false,
                    ..tap("tap0")
                }
            ),
            [down(PortLoss::CarrierLost)],
            "up again, but nobody is there"
        );
    }

    #[test]
    fn uplink_without_carrier_stays() {
        let mut links = Links::new(rules(&[], &["tap0"]));
        set(&mut links, bridge(BR0, "br0"));
        set(&mut links, tap("tap0"));
        assert_eq!(
            set(
                &mut links,
                Link {
                    carrier: false,
                    ..tap("tap0")
                }
            ),
            []
        );
    }

    #[test]
    fn dump_finds_what_messages_missed() {
        let mut links = running();
        links.begin_dump();
        set(&mut links, bridge(BR0, "br0"));
        let other = Link {
            ifindex: 11,
            ..tap("tap1")
        };
        let found = Port {
            ifindex: 11,
            name: "tap1".to_owned(),
            segment: BR0,
            role: Role::Vm,
        };
        assert_eq!(set(&mut links, other), [PortEvent::PortUp(found)]);
        assert_eq!(links.end_dump(), [down(PortLoss::Deleted)]);
        assert_eq!(links.end_dump(), []);
    }

    #[test]
    fn dump_that_shows_the_same_says_nothing() {
        let mut links = running();
        links.begin_dump();
        assert_eq!(set(&mut links, tap("tap0")), []);
        assert_eq!(set(&mut links, bridge(BR0, "br0")), []);
        assert_eq!(links.end_dump(), []);
    }

    #[test]
    fn index_reused_while_messages_were_lost() {
        let mut links = running();
        links.begin_dump();
        let reused = Link {
            mac: mac(99),
            ..tap("tap7")
        };
        assert_eq!(
            set(&mut links, reused),
            [down(PortLoss::Deleted), up("tap7", BR0, Role::Vm)]
        );
    }

    #[test]
    fn removed_between_the_rows_of_a_dump_stays_removed() {
        let mut links = running();
        links.begin_dump();
        set(&mut links, bridge(BR0, "br0"));
        set(&mut links, tap("tap0"));
        assert_eq!(
            links.apply(LinkChange::Removed(TAP)),
            [down(PortLoss::Deleted)]
        );
        assert_eq!(links.end_dump(), []);
    }
}
