//! Orders of people: held against, carried out, and written down with who gave them.

use std::collections::BTreeMap;

use tokio::sync::oneshot;
use tracing::info;

use super::{
    Agent,
    view::{self, Clocks},
};
use crate::{
    clock,
    control::{
        ErrorCode, Order, OrderAnswer, Ordered, PauseView, Peer, ProbeView, Refusal, ReleaseResult,
        ReleaseView, Response, ResumeView, Which,
    },
    core::{
        Answer, AskError, Key, ReleaseOutcome,
        gates::{Gate, Override},
    },
    store::OperatorEntry,
};

/// Who waits for a VM's answer.
#[derive(Debug, Default)]
pub(super) struct Questions(BTreeMap<Key, Question>);

#[derive(Debug)]
struct Question {
    by: Peer,
    /// Its release was asked for, overriding these gates.
    release: Option<Vec<Gate>>,
    reply: oneshot::Sender<OrderAnswer>,
}

impl Agent {
    pub(super) async fn order_of(&mut self, ordered: Ordered) {
        let Ordered { order, by, reply } = ordered;
        if reply.is_closed() && matches!(order, Order::Release { .. }) {
            // Whoever ordered it was told to try again, and may have changed their mind.
            return;
        }
        let answer = match order {
            Order::Pause { reason } => self.pause(reason, by).await,
            Order::Resume => self.resume(by).await,
            Order::Probe(which) => match self.probe_now(&which) {
                Ok(key) => return self.wait_for_answer(key, by, None, reply).await,
                Err(refusal) => Err(refusal),
            },
            Order::Release { which, force } => match self.release_now(&which, &force, by) {
                Ok(key) => return self.wait_for_answer(key, by, Some(force), reply).await,
                Err(refusal) => Err(refusal),
            },
            Order::Import(import) => self.import_ordered(import, by).await,
        };
        // Whoever has gone meanwhile has still given the order.
        let _gone = reply.send(answer);
    }

    /// A pause that an earlier agent was told of goes on before anything is remembered.
    pub(super) fn take_over_pause(&mut self, pause: Option<PauseView>) {
        let Some(pause) = pause else {
            return;
        };
        info!(
            uid = pause.by.uid,
            "{}; nothing is released until `dhcp-reclaim resume`",
            pause.text()
        );
        self.engine.restore_pause(pause.text());
        self.memory.pause = Some(pause);
    }

    async fn pause(&mut self, reason: Option<String>, by: Peer) -> OrderAnswer {
        let clocks = Clocks::now();
        let pause = PauseView {
            since: clocks.wall,
            by,
            reason,
        };
        self.engine.pause(pause.text(), clocks.monotonic);
        self.memory.set_pause(Some(pause.clone()));
        self.write_down(by, "pause", pause.reason.clone());
        self.carry_out().await;
        if !self.commit() {
            let message = "paused, but it could not be written down: a restart ends it";
            return Err(Refusal::new(ErrorCode::Unavailable, message));
        }
        Ok(vec![Response::Paused(pause)])
    }

    async fn resume(&mut self, by: Peer) -> OrderAnswer {
        let clocks = Clocks::now();
        let resumed = self.engine.resume(&by.to_string(), clocks.monotonic);
        let paused = self.memory.set_pause(None);
        if paused.is_some() || resumed.breaker_closed {
            let what = match (paused.is_some(), resumed.breaker_closed) {
                (true, true) => "pause ended, breaker closed",
                (false, _) => "breaker closed",
                (true, false) => "pause ended",
            };
            self.write_down(by, "resume", Some(what.to_owned()));
        }
        self.carry_out().await;
        if !self.commit() {
            let message = "resumed, but it could not be written down: after a restart it is paused";
            return Err(Refusal::new(ErrorCode::Unavailable, message));
        }
        Ok(vec![Response::Resumed(ResumeView {
            paused,
            breaker_closed: resumed.breaker_closed,
        })])
    }

    fn probe_now(&mut self, which: &Which) -> Result<Key, Refusal> {
        let key = self.find(which)?;
        let asked = self.engine.ask(key, clock::monotonic());
        asked.map_err(|error| refused(which, error))?;
        Ok(key)
    }

    fn release_now(&mut self, which: &Which, force: &[Gate], by: Peer) -> Result<Key, Refusal> {
        for gate in force {
            if let Some(why) = gate.unforceable() {
                let message = format!("gate {gate} cannot be overridden: {why}");
                return Err(Refusal::new(ErrorCode::BadRequest, message));
            }
        }
        let key = self.find(which)?;
        let order = Override {
            who: by.to_string(),
            gates: force.iter().copied().collect(),
        };
        let asked = self.engine.ask_release(key, order, clock::monotonic());
        asked.map_err(|error| refused(which, error))?;
        Ok(key)
    }

    /// The one binding that is meant.
    fn find(&self, which: &Which) -> Result<Key, Refusal> {
        let bridge = |key: Key| self.segments.name(key.segment).unwrap_or("?");
        let meant = |key: &Key| {
            which
                .bridge
                .as_deref()
                .is_none_or(|name| name == bridge(*key))
                && which.vlan.is_none_or(|vlan| vlan == key.vlan)
        };
        let keys: Vec<Key> = self
            .engine
            .bindings_of(which.ip)
            .map(|binding| binding.key)
            .filter(meant)
            .collect();
        match &keys[..] {
            [key] => Ok(*key),
            [] => {
                let message = format!("{} is not known here", which.ip);
                Err(Refusal::new(ErrorCode::NotFound, message))
            }
            several => {
                let places = several.iter().map(|key| match key.vlan {
                    0 => bridge(*key).to_owned(),
                    vlan => format!("{} VLAN {vlan}", bridge(*key)),
                });
                let places: Vec<String> = places.collect();
                let message = format!(
                    "{} is known in several places, name one by --bridge and --vlan: {}",
                    which.ip,
                    places.join(", ")
                );
                Err(Refusal::new(ErrorCode::BadRequest, message))
            }
        }
    }

    async fn wait_for_answer(
        &mut self,
        key: Key,
        by: Peer,
        release: Option<Vec<Gate>>,
        reply: oneshot::Sender<OrderAnswer>,
    ) {
        // The core has one question open for each address.
        self.questions
            .0
            .insert(key, Question { by, release, reply });
        self.carry_out().await;
    }

    pub(super) fn answer_question(&mut self, key: Key, answer: Answer) {
        let Some(Question { by, release, reply }) = self.questions.0.remove(&key) else {
            return;
        };
        let clocks = Clocks::now();
        let binding = self.engine.binding(key);
        let view = binding.map(|it| view::binding(it, &self.segments, clocks));
        let Some(binding) = view else {
            let refusal = Refusal::new(ErrorCode::NotFound, "its lease has ended meanwhile");
            let _gone = reply.send(Err(refusal));
            return;
        };
        let (seen_at, seen_by) = match &answer {
            Answer::Alive { at, port } => (Some(clocks.wall(*at)), Some(port.clone())),
            Answer::Silent | Answer::Ended | Answer::Held(_) | Answer::Released(_) => (None, None),
        };
        let Some(force) = release else {
            let _gone = reply.send(match answer {
                Answer::Ended => {
                    let message = "its lease has ended meanwhile";
                    Err(Refusal::new(ErrorCode::NotFound, message))
                }
                Answer::Alive { .. } | Answer::Silent | Answer::Held(_) | Answer::Released(_) => {
                    Ok(vec![Response::Probed(ProbeView {
                        binding,
                        alive: seen_at.is_some(),
                        seen_at,
                        seen_by,
                    })])
                }
            });
            return;
        };
        let (result, gates) = match answer {
            Answer::Alive { .. } => (ReleaseResult::Alive, Vec::new()),
            Answer::Silent | Answer::Ended => (ReleaseResult::Ended, Vec::new()),
            Answer::Held(findings) => (ReleaseResult::Held, view::gates(&findings)),
            Answer::Released(ReleaseOutcome::Sent) => (ReleaseResult::Released, Vec::new()),
            Answer::Released(ReleaseOutcome::DryRun) => (ReleaseResult::WouldRelease, Vec::new()),
            Answer::Released(ReleaseOutcome::Vetoed) => (ReleaseResult::Vetoed, Vec::new()),
            Answer::Released(ReleaseOutcome::Failed | ReleaseOutcome::Overtaken) => {
                (ReleaseResult::Failed, Vec::new())
            }
        };
        let forced: Vec<&str> = force.iter().map(|gate| gate.name()).collect();
        let text = format!("{} --force {:?}: {result:?}", key.ip, forced.join(","));
        self.write_down(by, "release", Some(text));
        let _gone = reply.send(Ok(vec![Response::Release(ReleaseView {
            binding,
            result,
            seen_at,
            seen_by,
            gates,
        })]));
    }

    /// The audit of orders.
    pub(super) fn write_down(&mut self, by: Peer, order: &str, text: Option<String>) {
        info!(uid = by.uid, pid = by.pid, order, text, "order");
        let entry = OperatorEntry {
            ts: Clocks::now().wall,
            by,
            order: order.to_owned(),
            text,
        };
        self.memory.operator_entry(entry);
    }
}

fn refused(which: &Which, error: AskError) -> Refusal {
    let code = match error {
        AskError::Unknown => ErrorCode::NotFound,
        AskError::NotLeased(state) => {
            let message = format!("{} is {}: nobody is asked there", which.ip, state.name());
            return Refusal::new(ErrorCode::NotFound, message);
        }
        AskError::Open | AskError::TooMany => ErrorCode::Busy,
    };
    Refusal::new(code, format!("{}: {error}", which.ip))
}
