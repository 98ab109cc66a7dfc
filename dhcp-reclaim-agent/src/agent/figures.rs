//! What the loop tells Prometheus.

use tracing::warn;

use super::{Agent, chain};
use crate::{core::State, metrics::Snapshot};

impl Agent {
    pub(super) fn snapshot(&self) -> Snapshot {
        let waits = |binding: &&crate::core::binding::Binding| {
            binding.state == State::Gone && binding.turn.is_some()
        };
        let programs = self.kernel.programs().unwrap_or_else(|error| {
            warn!(error = %chain(&error), "cannot read what the programs cost");
            Vec::new()
        });
        Snapshot {
            stats: self.stats(),
            ports: self
                .watched
                .values()
                .map(|watched| watched.port.role)
                .collect(),
            blind: self.blind.len() as u64,
            imports: self.engine.imports().count() as u64,
            queue: self.engine.bindings().filter(waits).count() as u64,
            programs,
            reclaims: self.reclaims.clone(),
            clients_refused: 0,
        }
    }
}
