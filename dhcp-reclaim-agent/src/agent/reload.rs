//! SIGHUP: the configuration is read again. What is wrong with it is said, and the old one stays.

use tracing::{error, info};

use super::{Agent, chain};
use crate::{clock, core::IfIndex};

impl Agent {
    pub(super) fn reload(&mut self) {
        self.service.reloading(clock::monotonic());
        match self.reloaded() {
            Ok(()) => {
                self.counters.reloads += 1;
                info!("configuration read again, and followed");
                self.service.ready(&self.status());
            }
            Err(error) => {
                self.counters.reloads_refused += 1;
                let error = chain(error.as_ref());
                error!(error, "configuration refused; the old one stays");
                let status = format!("{}; new configuration refused: {error}", self.status());
                self.service.ready(&status.replace(char::is_control, " "));
            }
        }
    }

    fn reloaded(&mut self) -> anyhow::Result<()> {
        let wanted = self.source.load()?;
        let settings = self.settings.changed_to(&wanted).map_err(|keys| {
            let keys = keys.join(", ");
            anyhow::anyhow!("{keys}: cannot change while the agent runs; restart it instead")
        })?;
        self.engine
            .set_policy(settings.policy(), clock::monotonic());
        self.settings = settings;
        let ports: Vec<(IfIndex, (u16, u16))> = self
            .watched
            .values()
            .map(|watched| {
                let limits = self.record_limits(watched.port.role);
                (watched.port.ifindex, limits)
            })
            .collect();
        for (port, (rate, burst)) in ports {
            self.kernel.set_record_limits(port, rate, burst);
        }
        Ok(())
    }

    /// For `systemctl status`.
    pub(super) fn status(&self) -> String {
        let ports = self.watched.len();
        let bridges = self.settings.bridges.join(", ");
        match self.engine.breaker_opened_at() {
            Some(_) => format!("{ports} ports on {bridges}; breaker open"),
            None => format!("{ports} ports on {bridges}"),
        }
    }
}
