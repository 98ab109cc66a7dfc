//! A VM is gone: the gates, the turn at the server, the RELEASE.

use std::time::Duration;

use super::{Engine, RETRY};
use crate::core::{
    binding::Check,
    gates::{Finding, Gate, Verdict, breaker_rule, secs},
    pacing::ServerKey,
    types::{Action, Key, NoticeKind, Release, ReleaseOutcome, Sounding, State, Time},
};

/// A held binding is looked at again this often, if its gate cannot tell better.
const HELD_AGAIN: Duration = Duration::from_secs(1);

/// A cut of an uplink, in which a VM starts elsewhere and what it says is not heard, takes longer.
const FRESH: Duration = Duration::from_secs(1);

/// So much later than a probe's own time to answer, the answer has been looked for.
const ANSWERED: Duration = Duration::from_millis(200);

/// A cut that is mended while an answer is waited for goes unnoticed, unless it began before the question
/// before that one: which is not longer ago than this.
const TWICE: Duration = Duration::from_millis(2500);

/// Whose token another took who was later still waits for the next one.
const LATE: Duration = Duration::from_millis(20);

/// What came between is heard by then.
const OVERTAKEN: Duration = Duration::from_millis(100);

impl Engine {
    /// Silence went on for as long as it must: dead, unless a gate knows better.
    pub(super) fn gone(&mut self, key: Key, findings: &[Finding], now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        if binding.state != State::Gone {
            self.found_dead(key, findings, now);
            let Some(binding) = self.bindings.get(&key) else {
                return;
            };
            // The breaker has counted it now.
            let findings = self.case(binding).findings(now);
            self.judge(key, &findings, now);
            return;
        }
        self.judge(key, findings, now);
    }

    pub(super) fn found_dead(&mut self, key: Key, findings: &[Finding], now: Time) {
        let reason = reason_of(findings, Gate::Dead);
        self.set_state(key, State::Gone, NoticeKind::Gone, reason, now);
        if let Some(rule) = breaker_rule(&self.policy) {
            self.breaker.died(key, now, self.live, rule);
        }
    }

    fn judge(&mut self, key: Key, findings: &[Finding], now: Time) {
        let stop = findings
            .iter()
            .find(|finding| finding.verdict != Verdict::Pass);
        let has_turn = self.bindings.get(&key).is_some_and(|b| b.turn.is_some());
        // Before it takes its place in the queue; and once more when its turn has come.
        let goes_on = stop.is_none_or(|it| it.gate == Gate::Rate && !has_turn);
        if goes_on && self.is_stale(key, now) {
            self.give_way(key, now);
            self.ask_about(key, true, now);
            return;
        }
        let Some(stop) = stop else {
            self.order_release(key, now);
            return;
        };
        if stop.verdict == Verdict::Forget {
            self.end(key, State::Expired, stop.reason.clone(), now);
            return;
        }
        let told = self.bindings.get(&key).and_then(|binding| binding.held_by);
        let is_asked = has_turn && stop.gate == Gate::Dead;
        if is_asked {
            self.give_way(key, now);
        }
        if told != Some(stop.gate) && !is_asked {
            self.add(held_counter(stop.gate), 1);
            self.tell(
                key,
                NoticeKind::Held,
                format!("{}: {}", stop.gate, stop.reason),
                now,
            );
            if let Some(binding) = self.bindings.get_mut(&key) {
                binding.held_by = Some(stop.gate);
            }
        }
        if !matches!(stop.gate, Gate::Rate | Gate::Dead) {
            self.leave_queue(key);
        }
        let again = match stop.gate {
            Gate::Rate => self.take_turn(key, stop.again_at, now),
            Gate::Confirmed
            | Gate::Lease
            | Gate::Dead
            | Gate::Elsewhere
            | Gate::Unique
            | Gate::HoldDown
            | Gate::Settled
            | Gate::Paused
            | Gate::Breaker
            | Gate::Kernel => stop
                .again_at
                .unwrap_or(now + HELD_AGAIN)
                .max(now + Duration::from_millis(1)),
        };
        // While it waits it is still asked, as any silent VM is.
        let ask_at = self.ask_at(key, stop.gate, now);
        let asks_now = ask_at.is_some_and(|at| at <= now);
        if asks_now {
            match stop.gate {
                Gate::Rate => self.ask_about(key, true, now),
                _ => self.send_probes(key, now),
            }
        }
        let again = match (stop.gate, ask_at) {
            // Nothing else looks at it until then.
            (Gate::Rate, Some(at)) if !asks_now => at.min(again),
            _ => again,
        };
        self.schedule(key, again);
    }

    /// When to ask about whoever is kept by `gate`.
    fn ask_at(&self, key: Key, gate: Gate, now: Time) -> Option<Time> {
        let binding = self.bindings.get(&key)?;
        let Check::Watching(watching) = binding.check else {
            return None;
        };
        let Some(probed_at) = watching.probed_at else {
            return Some(now);
        };
        let at = probed_at + self.policy.probe_interval;
        match (gate, binding.turn.filter(|turn| *turn > now)) {
            (Gate::Dead, _) => Some(probed_at + self.dead_again(key, probed_at)),
            // Whoever is asked when its turn comes is late for it.
            (Gate::Rate, Some(turn)) => {
                let before =
                    |wait: Duration| Time::ZERO + turn.since(Time::ZERO).saturating_sub(wait);
                let wait = self.case(binding).probe_wait() + ANSWERED;
                let (last, last_but_one) = (before(wait), before(wait + TWICE - ANSWERED));
                match self.fresh_until(key) {
                    Some(_) if probed_at < last_but_one => Some(at.min(last_but_one)),
                    Some(end) if end < turn + ANSWERED => Some(at.min(last)),
                    _ => Some(at).filter(|at| *at <= last),
                }
            }
            _ => Some(at),
        }
    }

    /// Whether the uplink may have been cut since everybody was asked, for long enough that a VM has started
    /// beyond it: something else has kept a dead VM, which is asked seldom then, and alone.
    pub(super) fn is_stale(&self, key: Key, now: Time) -> bool {
        self.fresh_until(key).is_some_and(|end| end < now)
    }

    /// Until when the latest two questions to everybody tell enough of who is beyond an uplink, if there is
    /// one.
    fn fresh_until(&self, key: Key) -> Option<Time> {
        let binding = self.bindings.get(&key)?;
        let Check::Watching(watching) = binding.check else {
            return None;
        };
        let can_tell = watching.everywhere
            && self.has_uplink(key.segment)
            && !self.policy.without.contains(&Gate::Dead);
        let fresh = self.case(binding).probe_wait() + FRESH;
        let end = match watching.all_asked {
            [Some(before), Some(at)] if at.since(before) <= TWICE => at + fresh,
            _ => Time::ZERO,
        };
        can_tell.then_some(end)
    }

    /// It is its turn, and it is not ready: another has its place at the server.
    fn give_way(&mut self, key: Key, now: Time) {
        if let Some(server) = self.bindings.get(&key).and_then(|b| b.server) {
            let server = (key.segment, key.vlan, server);
            let next = self.pacing.give_way(server, key, now);
            self.call(server, next, now);
        }
    }

    /// A place in its server's queue; who has had one comes back for the next token.
    fn take_turn(&mut self, key: Key, again_at: Option<Time>, now: Time) -> Time {
        let soon = now + Duration::from_millis(1);
        let again = again_at.map_or(soon, |at| at.max(soon));
        let Some(binding) = self.bindings.get_mut(&key) else {
            return again;
        };
        let Some(server) = binding.server else {
            return again;
        };
        let pace = (key.segment, key.vlan, server);
        if let Some(turn) = binding.turn {
            if turn + LATE > now || self.pacing.is_shown(pace, now) {
                self.pacing.wait_again(pace, key, turn);
                self.sound(key, now);
                return again;
            }
            // Time is the pace, and many may have missed their turns: each comes back by itself.
            self.pacing.leave(pace, key, turn);
        }
        let turn = self.pacing.queue(pace, key, now);
        binding.turn = Some(turn);
        self.sound(key, now);
        turn.max(soon)
    }

    /// Asks the server of `key` how far it has read, if it is time to.
    fn sound(&mut self, key: Key, now: Time) {
        let Some(server) = self.bindings.get(&key).and_then(|b| b.server) else {
            return;
        };
        let server_mac = self.bindings.get(&key).and_then(|b| b.server_mac);
        if let Some(mark) = self.pacing.sounding((key.segment, key.vlan, server), now) {
            self.add("soundings", 1);
            self.actions.push_back(Action::Sound(Sounding {
                segment: key.segment,
                vlan: key.vlan,
                server,
                server_mac: server_mac.or_else(|| self.server_mac(key.segment, key.vlan, server)),
                ip: key.ip,
                mark,
            }));
        }
    }

    /// A server has read what it was sent up to `mark`: those who wait for it go on.
    pub(super) fn server_read(&mut self, server: ServerKey, mark: u64, now: Time) {
        self.add("soundings_answered", 1);
        let next = self.pacing.read_up_to(server, mark, now);
        self.call(server, next, now);
    }

    /// It is the turn of those that had these ones.
    fn call(&mut self, server: ServerKey, next: Vec<(Time, Key)>, now: Time) {
        for (turn, key) in next {
            if let Some(binding) = self.bindings.get_mut(&key)
                && binding.turn == Some(turn)
            {
                binding.turn = Some(now);
                self.schedule(key, now);
            } else {
                self.pacing.leave(server, key, turn);
            }
        }
    }

    fn order_release(&mut self, key: Key, now: Time) {
        self.order_release_because(key, "", now);
    }

    pub(super) fn order_release_because(&mut self, key: Key, why: &str, now: Time) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let (Some(server), Check::Watching(watching)) = (binding.server, binding.check) else {
            return;
        };
        // Before the token is taken: a gate that passed is not to seem to hold.
        let grounds = self.case(binding).findings(now);
        let (pace, turn) = ((key.segment, key.vlan, server), binding.turn);
        if !self.pacing.take(pace, key, turn, now) && !self.policy.without.contains(&Gate::Rate) {
            self.schedule(key, now + HELD_AGAIN);
            return;
        }
        let release = Release {
            segment: key.segment,
            vlan: key.vlan,
            ip: key.ip,
            chaddr: binding.chaddr,
            client_id: binding.client_id.clone(),
            server,
            server_mac: binding
                .server_mac
                .or_else(|| self.server_mac(key.segment, key.vlan, server)),
            silent_since: watching.armed_at,
        };
        let reason = format!(
            "{why}to {server}: silent for {}",
            secs(now.since(watching.armed_at))
        );
        self.set_state(key, State::Releasing, NoticeKind::Releasing, reason, now);
        self.grounds.insert(key, grounds);
        self.actions.push_back(Action::Release { key, release });
        self.sound(key, now);
    }

    pub(super) fn released(&mut self, key: Key, outcome: ReleaseOutcome, now: Time) {
        self.grounds.remove(&key);
        let Some(binding) = self
            .bindings
            .get_mut(&key)
            .filter(|b| b.state == State::Releasing)
        else {
            return;
        };
        let server = binding.server.map(|ip| ip.to_string()).unwrap_or_default();
        match outcome {
            ReleaseOutcome::Sent => {
                self.add("releases_sent", 1);
                self.breaker.released(key);
                self.begin_vigil(key, now);
                self.finish(
                    key,
                    NoticeKind::Released,
                    format!("RELEASE sent to {server}, unverified"),
                    now,
                );
            }
            ReleaseOutcome::DryRun => {
                self.add("releases_dry_run", 1);
                self.finish(
                    key,
                    NoticeKind::WouldRelease,
                    format!("dry run: to {server}"),
                    now,
                );
            }
            // A repetition that does not leave: the first one stands.
            ReleaseOutcome::Vetoed | ReleaseOutcome::Failed | ReleaseOutcome::Overtaken
                if binding.vigil.is_some() =>
            {
                if let Some(vigil) = &mut binding.vigil {
                    vigil.closed = true;
                }
                self.add("repetitions_stopped", 1);
                self.finish(
                    key,
                    NoticeKind::Held,
                    "the repetition did not leave: the VM was seen, or nothing could be sent"
                        .into(),
                    now,
                );
            }
            ReleaseOutcome::Vetoed => {
                binding.state = State::Silent;
                binding.vetoed = true;
                self.save(key);
                self.add("releases_vetoed", 1);
                self.add(held_counter(Gate::Kernel), 1);
                self.tell(
                    key,
                    NoticeKind::Vetoed,
                    "kernel: a frame of it came after the decision".into(),
                    now,
                );
                self.wake(key, now);
            }
            ReleaseOutcome::Overtaken => {
                binding.state = State::Gone;
                binding.turn = None;
                self.save(key);
                self.add("releases_overtaken", 1);
                self.schedule(key, now + OVERTAKEN);
            }
            ReleaseOutcome::Failed => {
                binding.state = State::Gone;
                binding.turn = None;
                binding.failures += 1;
                let again = now + RETRY * binding.failures.min(60);
                self.save(key);
                self.add("releases_failed", 1);
                self.tell(
                    key,
                    NoticeKind::ReleaseFailed,
                    "it could not be sent".into(),
                    now,
                );
                self.schedule(key, again);
            }
        }
    }

    fn finish(&mut self, key: Key, kind: NoticeKind, reason: String, now: Time) {
        self.retire(key, State::Released, now, false);
        self.tell(key, kind, reason, now);
    }

    /// Gives up the place in the server's queue.
    pub(super) fn leave_queue(&mut self, key: Key) {
        let Some(binding) = self.bindings.get_mut(&key) else {
            return;
        };
        if let (Some(turn), Some(server)) = (binding.turn.take(), binding.server) {
            self.pacing
                .leave((key.segment, key.vlan, server), key, turn);
        }
    }
}

fn reason_of(findings: &[Finding], gate: Gate) -> String {
    findings
        .iter()
        .find(|finding| finding.gate == gate)
        .map(|f| f.reason.clone())
        .unwrap_or_default()
}

/// Counters carry the gate's name, so that each has its own.
fn held_counter(gate: Gate) -> &'static str {
    match gate {
        Gate::Confirmed => "held_confirmed",
        Gate::Lease => "held_lease",
        Gate::Dead => "held_dead",
        Gate::Elsewhere => "held_elsewhere",
        Gate::Unique => "held_unique",
        Gate::HoldDown => "held_hold_down",
        Gate::Settled => "held_settled",
        Gate::Paused => "held_paused",
        Gate::Breaker => "held_breaker",
        Gate::Rate => "held_rate",
        Gate::Kernel => "held_kernel",
    }
}
