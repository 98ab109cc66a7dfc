//! How far a server has read: asked behind RELEASEs, so that it is sent no more than it has room for.
//!
//! A server elsewhere is sent a DHCPINFORM from the bridge's own address. It keeps nothing of it, and
//! its answer comes in by an uplink, behind all that it had to read before. Of a server on this host
//! the kernel tells how much lies in its sockets.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, time::Duration};

use dhcp_reclaim_ebpf::{
    abi::{DIRECTION_FROM_PORT, ROLE_UPLINK, Record},
    wire::{ACK, NAK},
};
use tracing::debug;

use super::{Agent, chain, draw_xid};
use crate::{
    clock,
    core::{Event, IfIndex, Sounding, Time, pacing::ServerKey},
    packet::inform::inform_frame,
};

/// An answer that comes later says nothing that a later question does not.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the sockets of a server on this host.
const LOOK: Duration = Duration::from_millis(2);
/// Questions on their way, and servers of this host that are looked at: more than the core asks.
const OPEN: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Soundings {
    /// Behind how many RELEASEs of this turn each is to be sent.
    pending: Vec<(usize, Sounding)>,
    open: BTreeMap<u32, Asked>,
    /// Servers on this host, by the bridge that they listen at; when they are looked at next.
    local: BTreeMap<ServerKey, Look>,
    look_at: Time,
    pub(super) failed: u64,
}

/// At the sockets of a server on this host.
#[derive(Debug)]
struct Look {
    mark: u64,
    bridge: IfIndex,
    until: Time,
}

#[derive(Debug)]
struct Asked {
    server: ServerKey,
    mark: u64,
    until: Time,
}

impl Soundings {
    pub(super) fn ask_behind(&mut self, releases: usize, sounding: Sounding) {
        self.pending.push((releases, sounding));
    }

    pub(super) fn take_pending(&mut self) -> Vec<(usize, Sounding)> {
        std::mem::take(&mut self.pending)
    }

    /// What a record answers, if it answers a question.
    pub(super) fn answered(&mut self, record: &Record) -> Option<Event> {
        let from_server = record.role == ROLE_UPLINK
            && record.direction == DIRECTION_FROM_PORT
            && record.op == 2
            && [ACK, NAK].contains(&record.message_type);
        if self.open.is_empty() || !from_server {
            return None;
        }
        let xid = u32::from_be_bytes(record.xid);
        let from = Ipv4Addr::from(record.source_ip);
        let asked = self.open.get(&xid).filter(|asked| asked.server.2 == from)?;
        let (server, mark) = (asked.server, asked.mark);
        // It has read those that were asked before, too.
        self.open
            .retain(|_, asked| asked.server != server || asked.mark > mark);
        Some(Event::ServerRead { server, mark })
    }

    /// Waits until the sockets of a server on this host are to be looked at.
    pub(super) async fn look(&self) {
        if self.local.is_empty() {
            return std::future::pending().await;
        }
        tokio::time::sleep(self.look_at.since(clock::monotonic())).await;
    }

    fn expire(&mut self, now: Time) {
        self.open.retain(|_, asked| asked.until > now);
        self.local.retain(|_, look| look.until > now);
    }
}

impl Agent {
    /// Sends the questions that belong behind the first `sent` RELEASEs of this turn.
    pub(super) async fn sound_behind(&mut self, pending: &mut Vec<(usize, Sounding)>, sent: usize) {
        let due = pending.iter().take_while(|(behind, _)| *behind <= sent);
        let due = due.count();
        for (_, sounding) in pending.drain(..due).collect::<Vec<_>>() {
            if let Err(why) = self.sound(&sounding).await {
                self.soundings.failed += 1;
                debug!(server = %sounding.server, why, "cannot ask how far it has read");
            }
        }
    }

    async fn sound(&mut self, sounding: &Sounding) -> Result<(), String> {
        let server = (sounding.segment, sounding.vlan, sounding.server);
        let now = clock::monotonic();
        self.soundings.expire(now);
        if self.soundings.open.len() + self.soundings.local.len() >= OPEN {
            return Err("too many are open".to_owned());
        }
        let own_vlan = self.own_vlan(sounding.segment);
        let bridge = self.segments.bridge(sounding.segment).ok_or("no bridge")?;
        let networks = self.addresses.of(bridge.ifindex).await;
        let networks = networks.map_err(|error| chain(&error))?;
        if networks.iter().any(|(own, _)| *own == sounding.server) {
            if self.soundings.local.is_empty() {
                self.soundings.look_at = now + LOOK;
            }
            let look = Look {
                mark: sounding.mark,
                bridge: bridge.ifindex,
                until: now + PATIENCE,
            };
            self.soundings.local.insert(server, look);
            return Ok(());
        }
        if own_vlan != Some(sounding.vlan) {
            return Err("the bridge's own address is on another VLAN".to_owned());
        }
        // Of a network that the server serves: some versions of Kea do not survive to be asked from
        // another one (CVE-2025-40779).
        let from = networks.iter().find(|(own, prefix)| {
            let host = 32_u32.saturating_sub(u32::from(*prefix));
            let network = |ip: Ipv4Addr| ip.to_bits().checked_shr(host);
            network(*own) == network(sounding.ip)
        });
        let (from, _) = *from.ok_or("the bridge has no address in the VM's network")?;
        let server_mac = sounding.server_mac.ok_or("its MAC is not known")?;
        let xid = draw_xid().ok_or("no random numbers")?;
        let frame = inform_frame((bridge.mac, from), (server_mac, sounding.server), xid);
        let frame = frame.map_err(|error| chain(&error))?;
        let sent = self.socket.send_on(bridge.ifindex, &frame);
        sent.map_err(|error| chain(&error))?;
        let asked = Asked {
            server,
            mark: sounding.mark,
            until: now + PATIENCE,
        };
        self.soundings.open.insert(xid, asked);
        Ok(())
    }

    /// Looks whether servers on this host have read all that they were sent.
    pub(super) async fn look_at_sockets(&mut self) {
        let now = clock::monotonic();
        if self.soundings.local.is_empty() || now < self.soundings.look_at {
            return;
        }
        self.soundings.expire(now);
        self.soundings.look_at = now + LOOK;
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (udp, packet) = (read("/proc/self/net/udp"), read("/proc/self/net/packet"));
        let idle: Vec<(ServerKey, u64)> = self
            .soundings
            .local
            .iter()
            .filter(|(_, look)| nothing_waits(&udp, &packet, look.bridge))
            .map(|(server, look)| (*server, look.mark))
            .collect();
        for (server, mark) in idle {
            self.soundings.local.remove(&server);
            self.tell(Event::ServerRead { server, mark }).await;
        }
    }
}

/// Whether all that lies in the sockets of DHCP servers at this link has been read; false if there is
/// no such socket. `udp` and `packet` are the kernel's tables of sockets.
fn nothing_waits(udp: &str, packet: &str, link: IfIndex) -> bool {
    let mut sockets = 0;
    let mut waiting = 0;
    for line in udp.lines().skip(1) {
        // sl local_address rem_address st tx_queue:rx_queue ...
        let mut fields = line.split_whitespace();
        let is_server = fields.nth(1).is_some_and(|local| local.ends_with(":0043"));
        let queues = fields.nth(2).and_then(|queues| queues.split_once(':'));
        if let (true, Some((_, received))) = (is_server, queues) {
            sockets += 1;
            waiting += u64::from_str_radix(received, 16).unwrap_or(1);
        }
    }
    for line in packet.lines().skip(1) {
        // sk RefCnt Type Proto Iface R Rmem User Inode
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, _, at, _, received, ..] = fields[..] else {
            continue;
        };
        if at.parse() == Ok(link) {
            sockets += 1;
            waiting += received.parse().unwrap_or(1);
        }
    }
    sockets > 0 && waiting == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const UDP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n\
        \x20 213: 00000000:0043 00000000:0000 07 00000000:QUEUE 00:00000000 00000000 0 0 1 2 0 0\n\
        \x20 300: 00000000:0035 00000000:0000 07 00000000:00000300 00:00000000 00000000 0 0 1 2 0 0\n";
    const PACKET: &str = "sk RefCnt Type Proto Iface R Rmem User Inode\n\
        0000 3 3 0003 7 1 RMEM 0 22\n0000 3 3 0003 8 1 900 0 22\n";

    #[test]
    fn sockets_of_servers_at_the_link_count() {
        let udp = |queue: &str| UDP.replace("QUEUE", queue);
        let packet = |rmem: &str| PACKET.replace("RMEM", rmem);
        let none = "header\n";
        assert!(nothing_waits(&udp("00000000"), none, 7));
        assert!(!nothing_waits(&udp("00000500"), none, 7));
        assert!(nothing_waits(none, &packet("0"), 7));
        assert!(!nothing_waits(none, &packet("1280"), 7));
        assert!(!nothing_waits(&udp("00000000"), &packet("1280"), 7));
        assert!(!nothing_waits(none, none, 7), "nobody listens");
        assert!(!nothing_waits(none, &packet("0"), 9), "nobody listens here");
    }
}
