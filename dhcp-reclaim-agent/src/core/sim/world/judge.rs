//! The invariants, by the world's own truth.

use super::*;

impl World {
    /// Notes what the node was shown, by the world's own reading.
    pub(super) fn learn(&mut self, node: usize, event: &Event) {
        let Event::Message(message) = event else {
            return;
        };
        let ip = wire::about(message).filter(|_| message.kind != MessageType::Offer);
        let fact = Fact {
            at: self.world_time(node, message.seen_at),
            ack: message.kind == MessageType::Ack,
            chaddr: message.chaddr,
            ip,
        };
        let rogue = message.role == Role::Vm
            && message.direction == Direction::FromPort
            && matches!(message.kind, MessageType::Ack | MessageType::Nak);
        if rogue || message.kind == MessageType::Discover {
            return;
        }
        let state = &mut self.nodes[node];
        if let Some(ip) = ip {
            let known: Vec<MacAddr> = state
                .engine
                .bindings()
                .filter(|binding| binding.key == key_of(ip) && binding.is_live())
                .map(|binding| binding.chaddr)
                .collect();
            if known.is_empty() {
                state.claims.retain(|(_, about)| *about != ip);
            } else if !known.contains(&message.chaddr) {
                state.claims.insert((message.chaddr, ip));
            }
            let twice = state.engine.bindings().any(|binding| {
                let same = binding.key == key_of(ip) && binding.chaddr == message.chaddr;
                same && binding.is_live() && binding.port != message.port
            });
            if fact.ack && twice && message.role == Role::Vm {
                // What is said there is not believed while its first port is up, and so its lease
                // may end earlier here than at the server.
                let secs = message.lease_secs.unwrap_or_default().into();
                let until = fact.at + Duration::from_secs(secs);
                state.excused.insert(ip, until);
            }
            if fact.ack {
                state.given_back.remove(&(message.chaddr, ip));
                // A death that ended is none of a failing node's.
                state.released.retain(|(_, released)| *released != ip);
            }
        }
        let facts = &mut state.facts;
        facts.insert(Source::Mac(message.chaddr), fact);
        if let Some(ip) = ip {
            facts.insert(Source::Ip(ip), fact);
        }
    }

    /// (a), the lease's end, and (e), at the moment when a RELEASE leaves.
    pub(super) fn judge(&mut self, node: usize, release: &Release) {
        let ip = release.ip;
        let now = self.now;
        if self.nodes[node].paused {
            self.violate(Some(ip), "paused", "a person holds all releases".to_owned());
            return;
        }
        // Who is neither the MAC nor the client has nothing to lose by it: a forged REQUEST may have
        // made the server give the address away under its user.
        let client_id = release.client_id.as_deref();
        let owner = owner_of(vlan_of(ip), client_id, release.chaddr);
        let user = (0..self.vms.len()).find(|vm| {
            let it = &self.vms[*vm];
            if it.mac != release.chaddr && it.owner() != owner {
                return false;
            }
            let uses = it.life == Life::Running && it.ip == Some(ip) && it.lease_until > now;
            uses && !self.is_hidden_clone(node, it, release) && !self.spoke_too_late(node, it)
        });
        if let Some(vm) = user {
            let still = self.vms[vm].still_until > now;
            let how = if still {
                "alive, though still"
            } else {
                "alive"
            };
            self.violate(
                Some(ip),
                "never-the-living",
                format!("vm{vm} is {how} and uses {ip}"),
            );
            return;
        }
        let left = self.leases.get(&ip).map(|lease| lease.until.since(now));
        let clones = self
            .vms
            .iter()
            .filter(|vm| vm.client_id.is_some() && vm.client_id == release.client_id)
            .count();
        // What another clone agreed on with the server elsewhere is not told here.
        // Where no ACK is seen, no end is known.
        let forged = self.nodes[node]
            .excused
            .get(&ip)
            .is_some_and(|at| *at > now);
        let told = clones < 2 && !forged && self.setup.policy.commit == Commit::Ack;
        if told && left.is_some_and(|left| left < LEASE_SLACK) {
            self.violate(
                Some(ip),
                "lease",
                format!("its lease ends in {left:?}: the server may have ended it already"),
            );
            return;
        }
        if let Err(text) = self.property(node, release) {
            self.violate(Some(ip), "property", text);
            return;
        }
        let lost = self.setup.queries && left.is_some();
        if !self.nodes[node].given_back.insert((release.chaddr, ip)) && !lost {
            self.violate(
                Some(ip),
                "twice",
                "it was released before, and not leased again since".to_owned(),
            );
        }
    }

    /// Servers give clones that show one client-id one lease. That the other one lives is known by
    /// its messages, if they were heard here, or by its answers, if it can give any.
    fn is_hidden_clone(&self, node: usize, it: &Vm, release: &Release) -> bool {
        let state = &self.nodes[node];
        let clone =
            it.mac != release.chaddr && it.client_id.is_some() && it.client_id == release.client_id;
        let cut = state.shut_until().max(self.nodes[it.node].shut_until());
        let asleep = state.asleep_until.max(self.nodes[it.node].asleep_until);
        let quiet = it.still_until.max(cut).max(asleep);
        // On one host only the MAC of the dead is asked.
        let asked = self.setup.uplinks;
        let answers = asked && it.answers_arp && quiet <= release.silent_since;
        let heard = state.claims.contains(&(it.mac, release.ip));
        let missed = it
            .port
            .is_some_and(|port| state.lost_at.contains_key(&port))
            || state.lost_at.contains_key(&state.uplink);
        clone && !answers && (!heard || missed)
    }

    /// Its first word elsewhere came within the last five seconds of the hold-down, in a cut that began too
    /// late to be noticed.
    fn spoke_too_late(&self, node: usize, it: &Vm) -> bool {
        let within = |at: Time, time| at > Time::ZERO && self.now.since(at) < time;
        let cut = |node: usize| within(self.nodes[node].cut_since, UNNOTICED);
        it.node != node && within(it.asked_at, LAST_WORD) && (cut(node) || cut(it.node))
    }

    /// FACTS §7, over the world's truth: no frame of (port, MAC) within the confirmation time; the
    /// binding's ACK is the newest DHCP fact on this node for that MAC and that address; the probes
    /// all left and stayed unanswered; no hold is on.
    pub(super) fn property(&self, node: usize, release: &Release) -> Result<(), String> {
        let state = &self.nodes[node];
        let policy = &self.setup.policy;
        let key = key_of(release.ip);
        let silent = self.now.since(release.silent_since);
        let Some(binding) = state.binding(release.ip) else {
            return Err("the engine knows no such binding".to_owned());
        };
        let need = if state
            .ports
            .get(&binding.port)
            .is_some_and(|port| port.carrier)
        {
            policy.hold_down_silent
        } else if self.setup.uplinks {
            policy.hold_down_uplink
        } else {
            policy.hold_down
        };
        if silent < need {
            return Err(format!("silent for {silent:?} only, {need:?} are asked"));
        }
        for source in [Source::Ip(release.ip), Source::Mac(release.chaddr)] {
            if let Some((at, _)) = state.last_frame.get(&source)
                && *at > release.silent_since
                && !policy.without.contains(&Gate::Kernel)
            {
                return Err(format!(
                    "a frame of {source:?} came {:?} ago",
                    self.now.since(*at)
                ));
            }
        }
        let fact_ip = state.facts.get(&Source::Ip(release.ip));
        let fact_mac = state.facts.get(&Source::Mac(release.chaddr));
        for fact in [fact_ip, fact_mac] {
            let Some(fact) = fact else {
                return Err("this node was shown no DHCP message about it".to_owned());
            };
            let same = fact.ack && fact.chaddr == release.chaddr && fact.ip == Some(release.ip);
            if !same && self.now.since(fact.at) < need {
                return Err(format!("newer than its ACK, and within the hold: {fact:?}"));
            }
        }
        let probes = state.probes.get(&key).map_or(0, |times| {
            times
                .iter()
                .filter(|at| **at >= release.silent_since)
                .count()
        });
        if probes < policy.misses as usize {
            return Err(format!("{probes} probes left since silence began"));
        }
        let settled = state.started_at.max(state.links_changed) + policy.settle;
        if self.now < settled {
            return Err("the node's start, or a change of its links, is too recent".to_owned());
        }
        if let Some(lost) = state.lost_at.get(&binding.port)
            && state
                .last_frame
                .get(&Source::Ip(release.ip))
                .is_none_or(|(at, _)| at <= lost)
            && fact_ip.is_none_or(|fact| fact.at < *lost)
        {
            return Err("records of its port were lost since its address was seen".to_owned());
        }
        Ok(())
    }

    /// (c), and the breaker's bound.
    pub(super) fn count(&mut self, node: usize, ip: Ipv4Addr, repeated: bool) {
        let (now, policy) = (self.now, self.setup.policy.clone());
        let times = &mut self.nodes[node].releases;
        times.push(now);
        // Every interval that ends now, of those that the server has not shown to have read.
        let mut text = None;
        for (i, at) in times.iter().enumerate() {
            let sent = (times.len() - i) as f64;
            let may =
                f64::from(policy.burst) + now.since(*at).as_secs_f64() * f64::from(policy.rate);
            if sent > may + 1e-6 {
                text = Some(format!(
                    "{sent} RELEASEs in {:?}, {may} may be",
                    now.since(*at)
                ));
                break;
            }
        }
        if let Some(text) = text {
            self.violate(None, "rate", text);
            return;
        }
        // A repetition is no further death.
        if !repeated {
            self.nodes[node].released.push((now, ip));
        }
        let Some(share) = self.setup.bound_by_breaker else {
            return;
        };
        let window = policy.breaker_window;
        let started = self.nodes[node].started_at;
        if started > Time::ZERO + START && now < started + window {
            // One that starts has not counted those before.
            return;
        }
        if now < self.nodes[node].resumed_at + window * 2 {
            // What was held leaves at once, and a person has said that it may.
            return;
        }
        let recent = self.nodes[node]
            .released
            .iter()
            .filter(|(at, _)| now.since(*at) < window)
            .count();
        let live = self.nodes[node].engine.live();
        let may = policy
            .breaker_min
            .max(((live + recent) as f64 * share) as usize);
        if recent > may {
            self.violate(
                None,
                "breaker",
                format!("{recent} RELEASEs within one window, {may} may be"),
            );
        }
    }

    /// (b): what died is released within the bound, or a gate holds for good reason.
    #[expect(clippy::too_many_arguments, reason = "one event's fields")]
    pub(super) fn deadline(
        &mut self,
        ip: Ipv4Addr,
        owner: Vec<u8>,
        vm: VmId,
        incarnation: u32,
        node: usize,
        died: Time,
        bound: Duration,
    ) {
        let Some(lease) = self.leases.get(&ip) else {
            self.stats.deadlines += 1;
            return;
        };
        let it = &self.vms[vm];
        if lease.owner != owner
            || lease.until.since(self.now) < secs(20)
            || it.incarnation != incarnation
        {
            return;
        }
        let state = &self.nodes[node];
        // An agent that starts counts silence anew, and takes its time over what it has not seen;
        // that is all that a restart may cost.
        let mut from = died;
        let mut bound = bound;
        let looked_at = state.started_at + self.setup.policy.probe_wait + Duration::from_millis(10);
        let seen = state.last_frame.get(&Source::Mac(it.mac));
        // A quiet VM is looked at once in a while, and only that tells that it lived after its agent was
        // late at a port.
        let unheard = state.busy_until + self.setup.policy.silence * 2;
        if seen.is_none_or(|(at, _)| *at < looked_at) || unheard > died {
            bound = SLOW + self.setup.policy.hold_down_silent + self.setup.slack;
        }
        let used = state.last_frame.get(&Source::Ip(ip)).map(|(at, _)| *at);
        // Somebody else speaks there who has no lease, so that the port is not silent.
        let port = state.binding(ip).and_then(|it| state.ports.get(&it.port));
        let heard = port.and_then(|port| port.heard);
        // Two may have had it, if the server knew one of them no more.
        let resumed = Some(state.resumed_at);
        // What it does late it may find out late: then the slow road is as good.
        let busy = Some(state.busy_until);
        // Who asks for it in the meantime may have been its VM: silence begins anew.
        let asked_for = state.conflicts.get(&(it.mac, ip)).copied();
        for at in [
            Some(state.started_at),
            resumed,
            busy,
            used,
            heard,
            asked_for,
        ]
        .into_iter()
        .flatten()
        {
            if at > from {
                (from, bound) = (at, SLOW);
            }
        }
        // What kept it until now keeps it no more, and it is asked again.
        let clock = self.clock(node);
        let is_asked = state.binding(ip).is_some_and(|it| match it.check {
            Check::Watching(it) => it.probed_at.is_some_and(|at| clock.since(at) < secs(2)),
            Check::Idle | Check::Glancing => false,
        });
        let later = if state.down || state.paused || from + bound > self.now {
            Some(((from + bound).max(self.now + secs(1)), bound))
        } else if is_asked && bound <= SOON + self.setup.slack {
            Some((self.now + secs(10), bound + secs(10)))
        } else {
            None
        };
        if let Some((at, bound)) = later {
            let event = Ev::Deadline {
                ip,
                owner,
                vm,
                incarnation,
                node,
                died,
                bound,
            };
            self.at_time(at, event);
            return;
        }
        self.stats.deadlines += 1;
        let about = state.excused.get(&ip).is_some_and(|at| *at > died);
        let twin = self
            .vms
            .iter()
            .filter(|other| other.client_id.is_some() && other.client_id == it.client_id)
            .count()
            > 1;
        let binding = state.binding(ip);
        // Who else was given it may be alive, and which of them the server means is not known.
        let held = binding
            .is_some_and(|binding| matches!(binding.held_by, Some(Gate::Breaker | Gate::Unique)));
        let alarmed = binding.is_some_and(|it| {
            let mut alarms = state.stored_alarms.values();
            alarms.any(|alarm| alarm.port == it.port)
        });
        let given_back = state.given_back.contains(&(it.mac, ip));
        let lost = given_back && self.setup.release_loss > 0;
        // Of two answers, one of them to its MAC at another port, the end that comes sooner counts.
        let contested = state.conflicts.contains_key(&(it.mac, ip));
        let sooner = binding.is_some_and(|it| it.state == State::Expired) && contested;
        if state.excused_until > died || about || twin || held || alarmed || lost || sooner {
            self.stats.excused += 1;
            return;
        }
        let text = match binding {
            None => format!("vm{vm} died, and was forgotten"),
            Some(binding) => format!(
                "vm{vm} died {:?} ago and its address is still leased: {:?}, held by {:?}, {:?}",
                self.now.since(died),
                binding.state,
                binding.held_by,
                binding.check
            ),
        };
        self.violate(Some(ip), "liveness", text);
    }
}
