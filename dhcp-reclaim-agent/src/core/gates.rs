//! The gates between *gone* and a RELEASE. Each has a name, a verdict and a reason; all must pass.

use std::{collections::BTreeSet, fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    binding::{Binding, Check, Doubt, Origin, Watching},
    limits::{Breaker, BreakerRule},
    pacing::Pacing,
    policy::Policy,
    types::{Key, PortLoss, State, Time, Vlans},
};

/// Names are a contract: `explain`, the audit record and the counters carry them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    Confirmed,
    Lease,
    Dead,
    Elsewhere,
    Unique,
    HoldDown,
    Settled,
    Paused,
    Breaker,
    Rate,
    Kernel,
}

impl Gate {
    pub const ALL: [Self; 11] = [
        Self::Confirmed,
        Self::Lease,
        Self::Dead,
        Self::Elsewhere,
        Self::Unique,
        Self::HoldDown,
        Self::Settled,
        Self::Paused,
        Self::Breaker,
        Self::Rate,
        Self::Kernel,
    ];

    /// Why a person may not override it, if so.
    pub const fn unforceable(self) -> Option<&'static str> {
        match self {
            Self::Lease => Some(
                "the lease is over or nearly so: the server may have given the address to somebody else",
            ),
            Self::Dead => Some(
                "a VM that was not watched, or was seen, or was not asked, is not known to be dead",
            ),
            Self::Elsewhere => Some("the VM is alive behind another port"),
            Self::Rate => {
                Some("its turn comes by itself, and the server loses what comes too fast")
            }
            Self::Kernel => Some("the kernel half has the last word: the VM has just been heard"),
            Self::Confirmed
            | Self::Unique
            | Self::HoldDown
            | Self::Settled
            | Self::Paused
            | Self::Breaker => None,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Lease => "lease",
            Self::Dead => "dead",
            Self::Elsewhere => "elsewhere",
            Self::Unique => "unique",
            Self::HoldDown => "hold-down",
            Self::Settled => "settled",
            Self::Paused => "paused",
            Self::Breaker => "breaker",
            Self::Rate => "rate",
            Self::Kernel => "kernel",
        }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A person's order to release, and the gates that it overrides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    pub who: String,
    pub gates: BTreeSet<Gate>,
}

impl fmt::Display for Override {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} overrides", self.who)?;
        for (index, gate) in self.gates.iter().enumerate() {
            write!(f, "{} {gate}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Pass,
    /// Not now.
    Hold,
    /// Never: the lease ends, or has ended, by itself.
    Forget,
}

/// What one gate says, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub gate: Gate,
    pub verdict: Verdict,
    pub reason: String,
    /// When it is worth asking again, if the gate can tell.
    pub again_at: Option<Time>,
}

/// All that the gates look at.
pub struct Case<'a> {
    pub policy: &'a Policy,
    pub binding: &'a Binding,
    /// Another live binding that shows the same client-id.
    pub twin: Option<Key>,
    /// Whether the segment has an uplink.
    pub uplink: bool,
    /// Its bridge is not there.
    pub bridge_gone: bool,
    /// Nothing is released before this.
    pub settled_at: Time,
    /// Since when all ports of the segment are watched.
    pub watched_at: Time,
    /// Why nothing of the node may be released, if a person says so.
    pub paused: Option<&'a str>,
    pub breaker: &'a Breaker,
    pub pacing: &'a Pacing,
    /// A released address of its port or MAC was alive.
    pub alarmed: bool,
    /// A person orders its release.
    pub by: Option<&'a Override>,
    /// Why nothing of its segment may be released.
    pub segment_held: Option<&'a str>,
    /// The VLANs of its bridge itself, if that filters them.
    pub vlans: Option<&'a Vlans>,
    /// Live bindings of the node.
    pub live: usize,
}

impl Case<'_> {
    /// Every gate's finding, in the order of DESIGN: the first that holds is the one to tell.
    pub fn findings(&self, now: Time) -> Vec<Finding> {
        Gate::ALL.iter().map(|gate| self.ask(*gate, now)).collect()
    }

    fn ask(&self, gate: Gate, now: Time) -> Finding {
        let (verdict, reason, again_at) = match gate {
            gate if self.policy.without.contains(&gate) => pass("overridden"),
            Gate::Confirmed => self.confirmed(),
            Gate::Lease => self.lease(now),
            Gate::Dead => self.dead(now),
            Gate::Elsewhere => self.elsewhere(),
            Gate::Unique => self.unique(),
            Gate::HoldDown => self.hold_down(now),
            Gate::Settled => self.settled(now),
            Gate::Paused => match self.paused {
                Some(reason) => hold(reason),
                None => pass("nobody has paused the node"),
            },
            Gate::Breaker => self.breaker(now),
            Gate::Rate => self.rate(now),
            Gate::Kernel => pass("asked last, when the RELEASE leaves"),
        };
        let mut finding = Finding {
            gate,
            verdict,
            reason,
            again_at,
        };
        if let Some(by) = self.by
            && by.gates.contains(&gate)
            && gate.unforceable().is_none()
            && verdict == Verdict::Hold
        {
            finding.verdict = Verdict::Pass;
            finding.reason = format!("overridden by {}: {}", by.who, finding.reason);
        }
        finding
    }

    fn confirmed(&self) -> Answer {
        let binding = self.binding;
        if binding.is_hearsay() {
            return hold("imported, and its VM was never seen alive at a port here");
        }
        if let Some(reason) = self.segment_held {
            return hold(reason);
        }
        if self.policy.blind_to_tags && (self.vlans.is_some() || binding.key.vlan != 0) {
            return hold(
                "by XDP not every VLAN tag is seen, so it may be alive unseen: `hook = \"tc\"`",
            );
        }
        if let Some(vlans) = self.vlans {
            let vlan = binding.key.vlan;
            if vlan == 0 {
                return hold("its bridge filters VLANs, and which one it is on was not known");
            }
            if vlans.tag(vlan).is_none() {
                return hold(format!(
                    "its bridge filters VLANs and is no member of {vlan} itself, so nobody can be \
                     asked there: `bridge vlan add vid {vlan} dev BRIDGE self`"
                ));
            }
        }
        match binding.doubt {
            Some(Doubt::Ambiguous) => {
                return hold("a message about it may read differently at the server");
            }
            Some(Doubt::RecordsLost(_)) => {
                return hold("records of its port were lost since it was seen");
            }
            Some(Doubt::Conflict(_)) => return hold("another port claims its address or its MAC"),
            Some(Doubt::Contested) => {
                return hold(
                    "what it agreed on with the server at another port was not believed, or not heard: until \
                             it renews",
                );
            }
            None => {}
        }
        if self.alarmed {
            return hold("a released address of its port or MAC was alive: not bound again since");
        }
        if binding.server.is_none() {
            return hold("its server is not known");
        }
        match (binding.acked, binding.seen_alive) {
            (true, _) => pass("the server's ACK was seen"),
            (false, true) if binding.origin == Origin::Imported => {
                pass("imported, and the address was seen alive at its own port")
            }
            (false, true) => {
                pass("no ACK was seen, but the address was seen alive at its own port")
            }
            (false, false) => {
                hold("no ACK was seen, and the address was never seen alive at its port")
            }
        }
    }

    fn lease(&self, now: Time) -> Answer {
        let Some(expires) = self.binding.expires else {
            return pass(if self.binding.acked {
                "the lease is infinite"
            } else {
                "the lease's end was not seen"
            });
        };
        let remaining = expires.since(now);
        if remaining.is_zero() {
            return (Verdict::Forget, "the lease has expired".to_owned(), None);
        }
        if remaining < self.policy.min_remaining {
            let reason = format!(
                "{} left, less than min-remaining {}",
                secs(remaining),
                secs(self.policy.min_remaining)
            );
            return (Verdict::Forget, reason, None);
        }
        pass(format!("{} left", secs(remaining)))
    }

    fn dead(&self, now: Time) -> Answer {
        let Check::Watching(watching) = self.binding.check else {
            return hold("it is not being watched");
        };
        let Some((_, evidence)) = self
            .binding
            .evidence
            .as_deref()
            .filter(|(at, _)| *at >= watching.armed_at)
        else {
            return hold(if self.binding.was_deaf() {
                "the uplink was not heard, or no agent ran, so its silence is counted anew"
            } else {
                "no evidence yet"
            });
        };
        if !evidence.armed {
            return hold("the watch is not armed");
        }
        if watching.anew {
            return hold("something new was said of it, and it has not been looked at since");
        }
        if let Some(at) = evidence.own_at.filter(|at| *at >= watching.armed_at) {
            return hold(format!("a frame of it came {} ago", secs(now.since(at))));
        }
        if watching.everywhere
            && self.uplink
            && evidence.uplink_at.is_none_or(|at| at < watching.armed_at)
        {
            return hold("nothing was heard on the uplink since: the segment may be cut");
        }
        if watching.probes < self.policy.misses {
            return hold(format!(
                "{} of {} probes have left",
                watching.probes, self.policy.misses
            ));
        }
        let answered_at = watching.probed_at.map(|at| at + self.probe_wait());
        if answered_at.is_some_and(|at| now < at) {
            let reason = "the latest probe may still be answered".to_owned();
            return (Verdict::Hold, reason, answered_at);
        }
        if watching.everywhere && watching.probed_at.is_some_and(|at| at <= self.watched_at) {
            // Its VM may be behind that, and what it said before was not heard.
            return hold("a port is watched only since its latest probe left");
        }
        let end = Self::hold_began(watching) + self.hold();
        let is_early = |at: Time| at + self.probe_wait() < end;
        if now >= end
            && watching.everywhere
            && self.uplink
            && watching.probed_at.is_none_or(is_early)
        {
            // It may have started elsewhere meanwhile.
            return hold("no probe could leave shortly before the hold-down ended");
        }
        pass(format!(
            "{} probes unanswered, not a frame for {}",
            watching.probes,
            secs(now.since(watching.armed_at))
        ))
    }

    /// A probe into the segment of a lost port waits no longer than the rounds of that road do.
    pub fn probe_wait(&self) -> Duration {
        self.policy.probe_wait.min(self.round())
    }

    fn round(&self) -> Duration {
        match self.binding.lost() {
            // As the engine asks: one that waited for longer would never see the last round end.
            Some(_) => (self.hold() / self.policy.misses.max(1)).min(self.policy.probe_interval),
            None => self.policy.probe_interval,
        }
    }

    fn elsewhere(&self) -> Answer {
        // What another binding of the same MAC saw before is not this one's.
        let since = match self.binding.check {
            Check::Watching(watching) => watching.armed_at,
            Check::Idle | Check::Glancing => Time::ZERO,
        };
        match (self.binding.state, self.binding.evidence.as_deref()) {
            (State::Moved, _) => hold("the VM moved"),
            (_, Some((_, evidence))) if evidence.elsewhere.is_some_and(|(at, _)| at >= since) => {
                hold("it was seen behind another port")
            }
            _ => pass("not seen behind any other port"),
        }
    }

    fn unique(&self) -> Answer {
        if self.binding.shared {
            return hold("another MAC holds the same lease");
        }
        match self.twin {
            Some(twin) => hold(format!("{} shows the same client-id", twin.ip)),
            None => pass("no other live binding shows its client-id or its address"),
        }
    }

    fn hold_began(watching: Watching) -> Time {
        let lost = watching.lost.map_or(watching.armed_at, |(at, _)| at);
        lost.max(watching.armed_at)
    }

    /// How long silence must last on the binding's road.
    pub fn hold(&self) -> Duration {
        // Who lives behind the port of an imported lease only frames have said, which a neighbour can
        // send: whoever it is gets the time to be heard, until an ACK says more.
        if self.binding.was_deaf() || self.binding.origin == Origin::Imported {
            return self.policy.hold_down_silent;
        }
        match self.binding.lost() {
            // The VM runs on, on another bridge perhaps: that is no quicker than a silent one.
            // Nor is it clear what happened while nobody listened.
            None | Some((_, PortLoss::Detached | PortLoss::LinkDown | PortLoss::Unseen)) => {
                self.policy.hold_down_silent
            }
            Some((_, PortLoss::Deleted | PortLoss::CarrierLost)) if self.uplink => {
                self.policy.hold_down_uplink
            }
            Some((_, PortLoss::Deleted | PortLoss::CarrierLost)) => self.policy.hold_down,
        }
    }

    fn hold_down(&self, now: Time) -> Answer {
        let Check::Watching(watching) = self.binding.check else {
            return hold("the hold-down has not begun");
        };
        if watching.lost.is_none() && !self.policy.release_while_port_up {
            return hold("its port is up, and port-up is \"never\"");
        }
        let since = Self::hold_began(watching);
        let (passed, need) = (now.since(since), self.hold());
        if passed < need {
            let reason = format!("{} of {} have passed", secs(passed), secs(need));
            return (Verdict::Hold, reason, Some(since + need));
        }
        pass(format!(
            "{} have passed, {} were asked",
            secs(passed),
            secs(need)
        ))
    }

    fn settled(&self, now: Time) -> Answer {
        if self.bridge_gone {
            return hold("its bridge is gone: nobody can be asked until it is back");
        }
        if now < self.settled_at {
            let reason = format!(
                "the agent or its links changed: {} to go",
                secs(self.settled_at.since(now))
            );
            return (Verdict::Hold, reason, Some(self.settled_at));
        }
        pass("the agent and its links are settled")
    }

    fn breaker(&self, now: Time) -> Answer {
        let Some(rule) = breaker_rule(self.policy) else {
            return pass("off");
        };
        let deaths = self.breaker.deaths();
        let allowed = self.breaker.allowed(self.live, rule);
        match self.breaker.opened_at() {
            Some(at) => hold(format!(
                "open for {}: {deaths} of {} bindings died, {allowed} are allowed",
                secs(now.since(at)),
                self.live
            )),
            None => pass(format!(
                "{deaths} of {} bindings died, {allowed} are allowed",
                self.live
            )),
        }
    }

    fn rate(&self, now: Time) -> Answer {
        let Some(server) = self.binding.server else {
            return pass("nobody to send to");
        };
        let key = self.binding.key;
        let pace = (key.segment, key.vlan, server);
        let ready = self.pacing.ready_at(pace, self.binding.turn, now);
        if now < ready {
            let reason = format!(
                "{} on their way to {server} at most, {} a second if it does not show that it reads: \
                 its turn comes within {}",
                self.policy.burst,
                self.policy.rate,
                secs(ready.since(now))
            );
            return (Verdict::Hold, reason, Some(ready));
        }
        pass(format!("it is its turn at {server}"))
    }
}

pub fn breaker_rule(policy: &Policy) -> Option<BreakerRule> {
    let share = policy.breaker?;
    Some(BreakerRule {
        share,
        min: policy.breaker_min,
        window: policy.breaker_window,
    })
}

type Answer = (Verdict, String, Option<Time>);

fn pass(reason: impl Into<String>) -> Answer {
    (Verdict::Pass, reason.into(), None)
}

fn hold(reason: impl Into<String>) -> Answer {
    (Verdict::Hold, reason.into(), None)
}

/// A duration for people: `1.250s`.
pub fn secs(duration: Duration) -> String {
    format!("{:.3}s", duration.as_secs_f64())
}
