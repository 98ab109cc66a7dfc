//! What a person may order: a hold on all releases, a question to a VM, and a step taken early.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Engine, holds};
use crate::core::{
    binding::Check,
    gates::{Case, Finding, Gate, Override, Verdict},
    pacing::Bucket,
    types::{
        Action, Answer, Evidence, Key, NoticeKind, Probe, ProbeVia, ReleaseOutcome, State, Time,
    },
};

/// Questions a second, and at once: a person is slower, and a script is no flood.
const QUESTIONS: (u32, u32) = (10, 20);
/// Most VMs answer within this.
const SOON: Duration = Duration::from_millis(50);
/// A question has its answer after this, whatever the settings say.
const PATIENCE: Duration = Duration::from_secs(8);

/// What a person has ordered.
#[derive(Clone, Debug)]
pub(super) struct Operator {
    /// Why nothing is released.
    pub(super) paused: Option<String>,
    asked: BTreeMap<Key, Asked>,
    due: BTreeSet<(Time, Key)>,
    pace: Bucket,
}

impl Default for Operator {
    fn default() -> Self {
        let (rate, burst) = QUESTIONS;
        Self {
            paused: None,
            asked: BTreeMap::new(),
            due: BTreeSet::new(),
            pace: Bucket::new(rate, burst),
        }
    }
}

/// An open question.
#[derive(Clone, Debug)]
struct Asked {
    /// What came before is no answer.
    at: Time,
    until: Time,
    /// The next look is at the answer only.
    early: bool,
    /// It is more than a question.
    release: Option<Override>,
    /// Its RELEASE is on its way.
    ordered: bool,
}

/// Why a question is not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    #[error("it is not known here")]
    Unknown,
    #[error("no lease of it is known that lasts")]
    NotLeased(State),
    #[error("it is being asked already")]
    Open,
    #[error("too many questions at once")]
    TooMany,
}

/// What [`Engine::resume`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    pub was_paused: bool,
    pub breaker_closed: bool,
}

impl Operator {
    pub(super) fn next(&self) -> Option<Time> {
        self.due.first().map(|(at, _)| *at)
    }
}

impl Engine {
    // ---- pause -------------------------------------------------------------------------------

    /// From now on nothing of this node is released. Deaths are noticed as ever.
    pub fn pause(&mut self, reason: String, now: Time) {
        self.notify(now, NoticeKind::Paused, None, None, None, reason.clone());
        self.operator.paused = Some(reason);
    }

    /// An earlier agent's hold goes on.
    pub fn restore_pause(&mut self, reason: String) {
        self.operator.paused = Some(reason);
    }

    /// A person says go on: that ends the breaker's doubt, too.
    pub fn resume(&mut self, who: &str, now: Time) -> Resumed {
        let resumed = Resumed {
            was_paused: self.operator.paused.take().is_some(),
            breaker_closed: self.breaker.opened_at().is_some(),
        };
        let what = match (resumed.was_paused, resumed.breaker_closed) {
            (true, true) => "releases go on, breaker closed",
            (true, false) => "releases go on",
            (false, true) => "breaker closed",
            (false, false) => return resumed,
        };
        if resumed.breaker_closed {
            self.breaker.reset();
        }
        let reason = format!("{what}: {who}");
        self.notify(now, NoticeKind::Resumed, None, None, None, reason);
        resumed
    }

    /// Since when the breaker is open.
    pub fn breaker_opened_at(&self) -> Option<Time> {
        self.breaker.opened_at()
    }

    // ---- questions ---------------------------------------------------------------------------

    /// Asks its VM now, as it would be asked once it is silent. [`Action::Answer`] says what came.
    pub fn ask(&mut self, key: Key, now: Time) -> Result<(), AskError> {
        self.open_question(key, None, now)?;
        match self.bindings.get(&key).map(|binding| binding.check) {
            Some(Check::Watching(_)) => self.ask_beside(key),
            Some(Check::Idle | Check::Glancing) | None => self.look_and_probe(key, now),
        }
        Ok(())
    }

    /// Takes the steps towards its release early: asks at once, and without the pauses in between.
    /// All gates are asked but those that `by` overrides, and nothing of that lasts for longer than
    /// the answer takes.
    pub fn ask_release(&mut self, key: Key, by: Override, now: Time) -> Result<(), AskError> {
        self.open_question(key, Some(by), now)?;
        match self.bindings.get(&key).map(|binding| binding.check) {
            Some(Check::Watching(watching)) if watching.everywhere => {
                let answered = watching
                    .probed_at
                    .is_none_or(|at| now.since(at) >= self.policy.probe_wait);
                if watching.probes < self.policy.misses && answered && !watching.closing {
                    self.send_probes(key, now);
                } else {
                    self.ask_beside(key);
                }
            }
            // It may come to stand behind a RELEASE: every port counts from the beginning.
            Some(Check::Watching(_) | Check::Idle | Check::Glancing) | None => {
                self.begin_watch(key, None, true, now);
                self.send_probes(key, now);
            }
        }
        Ok(())
    }

    /// Who ordered the RELEASE that is on its way, and against which gates.
    pub fn ordered_by(&self, key: Key) -> Option<&Override> {
        let asked = self.operator.asked.get(&key)?;
        asked.release.as_ref().filter(|_| asked.ordered)
    }

    /// Until as many as are needed have left, its probes are not spread over the hold-down.
    pub(super) fn is_hurried(&self, key: Key) -> bool {
        let asked = self.operator.asked.get(&key);
        let check = self.bindings.get(&key).map(|binding| binding.check);
        let few = matches!(check, Some(Check::Watching(it)) if it.probes < self.policy.misses);
        few && asked.is_some_and(|asked| asked.release.is_some())
    }

    fn open_question(
        &mut self,
        key: Key,
        release: Option<Override>,
        now: Time,
    ) -> Result<(), AskError> {
        let Some(binding) = self.bindings.get(&key) else {
            return Err(AskError::Unknown);
        };
        match binding.state {
            State::Bound | State::Silent | State::Gone => {}
            State::Requested
            | State::Releasing
            | State::Released
            | State::Refused
            | State::Withdrawn
            | State::Expired
            | State::Moved => return Err(AskError::NotLeased(binding.state)),
        }
        if self.operator.asked.contains_key(&key) {
            return Err(AskError::Open);
        }
        if !self.operator.pace.take(now) {
            return Err(AskError::TooMany);
        }
        let wait = self.policy.probe_wait;
        let rounds = match release {
            Some(_) => self.policy.misses.max(2).saturating_add(1),
            None => 1,
        };
        let asked = Asked {
            at: now,
            until: now + wait.saturating_mul(rounds).min(PATIENCE),
            early: false,
            release,
            ordered: false,
        };
        let first = (now + SOON).min(asked.until);
        self.operator.asked.insert(key, asked);
        self.operator.due.insert((first, key));
        Ok(())
    }

    /// A probe that nothing is counted by: `misses` in a row are to be apart.
    fn ask_beside(&mut self, key: Key) {
        let Some(binding) = self.bindings.get(&key) else {
            return;
        };
        let (ip, mac, vlan) = (key.ip, binding.chaddr, key.vlan);
        let port = binding.lost().is_none().then_some(binding.port);
        let via = port.map_or(ProbeVia::Segment(key.segment), ProbeVia::Port);
        self.add("questions_asked", 1);
        self.actions.push_back(Action::Control {
            probe: Probe { via, vlan, ip, mac },
        });
    }

    pub(super) fn wake_questions(&mut self, now: Time) {
        while let Some(&(at, key)) = self.operator.due.first().filter(|(at, _)| *at <= now) {
            self.operator.due.remove(&(at, key));
            let binding = self.bindings.get(&key);
            let Some(asked) = self.operator.asked.get_mut(&key) else {
                continue;
            };
            let Some(binding) = binding.filter(|binding| binding.is_live()) else {
                self.answer(key, Answer::Ended);
                continue;
            };
            asked.early = now < asked.until;
            let next = if asked.early {
                asked.until
            } else {
                now + self.policy.probe_wait
            };
            let own_port = Some(binding.port).filter(|_| binding.lost().is_none());
            let mac = binding.chaddr;
            self.operator.due.insert((next, key));
            self.actions.push_back(Action::Look { key, mac, own_port });
        }
    }

    /// Whether a look is at the answer to a question only; the look itself may be the answer.
    pub(super) fn is_answered(&mut self, key: Key, evidence: &Evidence) -> bool {
        let Some(asked) = self.operator.asked.get_mut(&key) else {
            return false;
        };
        let early = std::mem::take(&mut asked.early);
        let Some(binding) = self.bindings.get(&key) else {
            return false;
        };
        let own = evidence.own_at.map(|at| (at, binding.port));
        let seen = own.max(evidence.elsewhere);
        match seen.filter(|(at, _)| *at >= asked.at) {
            Some((at, port)) => {
                let port = self.port_name(port);
                self.answer(key, Answer::Alive { at, port });
                false
            }
            None => early,
        }
    }

    /// After each look: whether the question has its answer by now.
    pub(super) fn conclude(&mut self, key: Key, now: Time) {
        let Some(asked) = self.operator.asked.get(&key) else {
            return;
        };
        let Some(binding) = self.bindings.get(&key).filter(|it| it.is_live()) else {
            self.answer(key, Answer::Ended);
            return;
        };
        let late = now >= asked.until;
        let Some(by) = &asked.release else {
            if late {
                self.answer(key, Answer::Silent);
            }
            return;
        };
        if binding.state == State::Releasing {
            // It was due by itself.
            return;
        }
        let mut findings = self.findings_with(key, by, now);
        if holds(&findings, Gate::Dead) && !late {
            return;
        }
        if self.is_stale(key, now) {
            if !late {
                self.ask_about(key, true, now);
                return;
            }
            let passed = |it: &&mut Finding| it.gate == Gate::Dead && it.verdict == Verdict::Pass;
            for finding in findings.iter_mut().filter(passed) {
                finding.verdict = Verdict::Hold;
                finding.reason =
                    "it may have started elsewhere since everybody was asked".to_owned();
            }
        }
        if findings.iter().any(|it| it.verdict != Verdict::Pass) {
            self.hold_question(key, findings, late, now);
            return;
        }
        self.order_now(key, &findings, now);
    }

    fn hold_question(&mut self, key: Key, findings: Vec<Finding>, late: bool, now: Time) {
        let mut stops = findings.iter().filter(|it| it.verdict != Verdict::Pass);
        let first = stops.next().map(|it| (it.gate, it.again_at));
        if let (Some((Gate::Rate, Some(again))), None, false) = (first, stops.next(), late) {
            // Its turn comes in a moment.
            self.operator.due.insert((again.max(now + SOON), key));
            return;
        }
        self.answer(key, Answer::Held(findings));
    }

    /// Every gate that is asked has let it pass.
    fn order_now(&mut self, key: Key, findings: &[Finding], now: Time) {
        let Some(asked) = self.operator.asked.get_mut(&key) else {
            return;
        };
        let Some(by) = asked.release.clone() else {
            return;
        };
        if self
            .bindings
            .get(&key)
            .is_some_and(|it| it.state != State::Gone)
        {
            self.found_dead(key, findings, now);
        }
        // The breaker has counted it now.
        let findings = self.findings_with(key, &by, now);
        if findings.iter().any(|it| it.verdict != Verdict::Pass) {
            self.answer(key, Answer::Held(findings));
            return;
        }
        if !by.gates.is_empty() {
            self.add("releases_forced", 1);
            self.tell(key, NoticeKind::Forced, by.to_string(), now);
        }
        if let Some(asked) = self.operator.asked.get_mut(&key) {
            asked.ordered = true;
        }
        self.order_release_because(key, &format!("ordered by {}: ", by.who), now);
        let releasing = self
            .bindings
            .get(&key)
            .is_some_and(|it| it.state == State::Releasing);
        if !releasing {
            self.answer(key, Answer::Held(findings));
        }
    }

    fn findings_with(&self, key: Key, by: &Override, now: Time) -> Vec<Finding> {
        let Some(binding) = self.bindings.get(&key) else {
            return Vec::new();
        };
        let case = Case {
            by: Some(by),
            ..self.case(binding)
        };
        case.findings(now)
    }

    /// What became of its RELEASE, if somebody waits to hear it.
    pub(super) fn answer_outcome(&mut self, key: Key, outcome: ReleaseOutcome) {
        let waits = self
            .operator
            .asked
            .get(&key)
            .is_some_and(|asked| asked.release.is_some());
        if waits {
            self.answer(key, Answer::Released(outcome));
        }
    }

    fn answer(&mut self, key: Key, answer: Answer) {
        self.operator.asked.remove(&key);
        self.operator.due.retain(|(_, other)| *other != key);
        self.actions.push_back(Action::Answer { key, answer });
    }
}
