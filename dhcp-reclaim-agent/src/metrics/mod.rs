//! Figures for Prometheus. Nothing that a guest says becomes a name or a label.

#![forbid(unsafe_code)]

mod http;

use std::{fmt, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet, text::encode},
    metrics::{MetricType, histogram::Histogram},
    registry::Registry,
};

pub use self::http::{MetricsRequest, MetricsServer};
use crate::{
    control::StatsView,
    core::{Role, State, gates::Gate},
};

const PREFIX: &str = "dhcp_reclaim";
/// From a hold-down of a second to one of half an hour, in seconds.
const RECLAIM_BUCKETS: [f64; 12] = [
    1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 30.0, 60.0, 180.0, 360.0, 600.0, 1800.0,
];

/// What the loop knows at one moment.
#[derive(Debug)]
pub struct Snapshot {
    pub stats: StatsView,
    /// Watched ports, whose they are.
    pub ports: Vec<Role>,
    /// Ports where no program could be attached.
    pub blind: u64,
    /// Imported leases whose VMs were not seen.
    pub imports: u64,
    /// Dead VMs that wait for their server's pace.
    pub queue: u64,
    pub programs: Vec<ProgramStats>,
    pub reclaims: Reclaims,
    /// Clients of this server that were turned away.
    pub clients_refused: u64,
}

/// What a BPF program of ours has cost; nothing, unless `kernel.bpf_stats_enabled` is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramStats {
    pub name: String,
    pub runs: u64,
    pub time: Duration,
}

/// How long it took from the loss of a port, or from silence, to the RELEASE.
#[derive(Clone, Debug)]
pub struct Reclaims(Histogram);

impl Default for Reclaims {
    fn default() -> Self {
        Self(Histogram::new(RECLAIM_BUCKETS))
    }
}

impl Reclaims {
    pub fn took(&self, time: Duration) {
        self.0.observe(time.as_secs_f64());
    }
}

impl Snapshot {
    /// In Prometheus' text format (version 0.0.4), which every version of it reads.
    pub fn text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(classic(&text))
    }

    fn counter(&self, name: &str) -> u64 {
        self.stats.counters.get(name).copied().unwrap_or(0)
    }
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Exposition(encoder);
        let Self { stats, .. } = self;
        out.gauges(
            "build_info",
            "The agent's version",
            "version",
            [(stats.version.as_str(), 1.0)],
        )?;
        // Milliseconds are more than anybody needs of it.
        let started =
            Duration::from_millis(u64::try_from(stats.started_at.as_millisecond()).unwrap_or(0));
        out.gauge(
            "start_time_seconds",
            "When the agent started, in seconds since 1970",
            started.as_secs_f64(),
        )?;
        out.gauge("dry_run", "Whether nothing is sent", flag(stats.dry_run))?;
        out.gauge(
            "paused",
            "Whether a person holds all releases",
            flag(stats.paused.is_some()),
        )?;
        self.encode_ports(&mut out)?;
        self.encode_leases(&mut out)?;
        self.encode_releases(&mut out)?;
        self.encode_losses(&mut out)?;
        self.encode_programs(&mut out)?;
        let counters = stats.counters.iter();
        out.counters(
            "stats",
            "Every counter of `dhcp-reclaim stats`, by its name there",
            "name",
            counters.map(|(name, count)| (name.as_str(), *count as f64)),
        )
    }
}

impl Snapshot {
    fn encode_ports(&self, out: &mut Exposition<'_>) -> Result<(), fmt::Error> {
        let count = |role| self.ports.iter().filter(|found| **found == role).count() as f64;
        let roles = [
            ("vm", count(Role::Vm)),
            ("uplink", count(Role::Uplink)),
            ("aside", count(Role::Aside)),
        ];
        out.gauges("ports", "Ports that are watched", "role", roles)?;
        out.gauge(
            "ports_unobserved",
            "Ports where no program could be attached: nothing of their segments is released",
            self.blind as f64,
        )
    }

    fn encode_leases(&self, out: &mut Exposition<'_>) -> Result<(), fmt::Error> {
        let bindings = STATES.map(|(name, state)| {
            let count = self.stats.bindings.get(&state).copied().unwrap_or(0);
            (name, count as f64)
        });
        out.gauges("bindings", "Leases that are known", "state", bindings)?;
        out.gauge(
            "imports",
            "Imported leases whose VMs were not seen here",
            self.imports as f64,
        )?;
        out.gauge(
            "pacing_queue",
            "Dead VMs whose RELEASE waits for its server's pace",
            self.queue as f64,
        )?;
        out.gauge(
            "breaker_open",
            "Whether so many VMs died at once that nothing is released",
            flag(self.stats.breaker_open_since.is_some()),
        )
    }

    fn encode_releases(&self, out: &mut Exposition<'_>) -> Result<(), fmt::Error> {
        let of = |name: &str| self.counter(name) as f64;
        out.counters(
            "releases",
            "RELEASEs that were decided, by what became of them",
            "outcome",
            [
                ("sent", of("core.releases_sent")),
                ("vetoed", of("core.releases_vetoed")),
                ("failed", of("core.releases_failed")),
                ("dry_run", of("core.releases_dry_run")),
            ],
        )?;
        out.counters(
            "release_answers",
            "What servers were seen to make of RELEASEs",
            "answer",
            [
                ("verified", of("core.releases_verified")),
                ("ignored", of("core.releases_ignored")),
            ],
        )?;
        out.counter(
            "released_alive",
            "Released addresses that were alive afterwards: each is an alarm",
            of("core.released_alive"),
        )?;
        let held = Gate::ALL.map(|gate| {
            let counter = format!("core.held_{}", gate.name().replace('-', "_"));
            (gate.name(), of(&counter))
        });
        out.counters(
            "holds",
            "Times that a gate began to hold a release; `kernel` is a veto at the last moment",
            "gate",
            held,
        )?;
        out.histogram(
            "reclaim_seconds",
            "From the loss of the port, or from silence, to the RELEASE",
            &self.reclaims.0,
        )
    }

    fn encode_losses(&self, out: &mut Exposition<'_>) -> Result<(), fmt::Error> {
        let of = |name: &str| self.counter(name) as f64;
        out.counter(
            "dhcp_messages",
            "DHCP messages that the programs met",
            of("kernel.dhcp"),
        )?;
        out.counter(
            "records",
            "Records that the programs handed on",
            of("kernel.records"),
        )?;
        out.counters(
            "records_lost",
            "Records that were lost, or that could not be read",
            "cause",
            [
                ("ring_full", of("kernel.ring_full")),
                ("rate_limited", of("kernel.rate_limited")),
                ("malformed", of("agent.malformed_records")),
            ],
        )?;
        out.counters(
            "probes",
            "ARP probes for addresses that were silent",
            "result",
            [
                ("sent", of("core.probes_sent") - of("core.probes_failed")),
                ("failed", of("core.probes_failed")),
            ],
        )?;
        for (name, help, counter) in [
            (
                "lease_queries",
                "DHCPLEASEQUERYs that were sent",
                "core.lease_queries",
            ),
            (
                "lease_queries_unanswered",
                "Those that nobody answered",
                "core.lease_queries_unanswered",
            ),
            (
                "conflicts",
                "Leases that somebody else laid claim to",
                "core.conflicts",
            ),
            (
                "rogue_servers",
                "Servers' messages by ports that are no uplinks",
                "core.rogue_server",
            ),
            (
                "store_failures",
                "Times that the state could not be written: nothing is released then",
                "agent.store_failures",
            ),
            (
                "audit_lost",
                "Lines that the audit trail lacks",
                "agent.audit_lost",
            ),
            (
                "watch_failures",
                "Times that a port could not be watched",
                "agent.watch_failures",
            ),
        ] {
            out.counter(name, help, of(counter))?;
        }
        out.counter(
            "metrics_clients_refused",
            "Clients of the metrics that were turned away: too many at once",
            self.clients_refused as f64,
        )
    }

    fn encode_programs(&self, out: &mut Exposition<'_>) -> Result<(), fmt::Error> {
        let runs = self.programs.iter();
        out.counters(
            "bpf_runs",
            "Runs of the BPF programs; zero unless kernel.bpf_stats_enabled is set",
            "program",
            runs.map(|program| (program.name.as_str(), program.runs as f64)),
        )?;
        let times = self.programs.iter();
        out.counters(
            "bpf_run_seconds",
            "Time that they took; zero unless kernel.bpf_stats_enabled is set",
            "program",
            times.map(|program| (program.name.as_str(), program.time.as_secs_f64())),
        )
    }
}

const STATES: [(&str, State); 10] = [
    ("requested", State::Requested),
    ("bound", State::Bound),
    ("silent", State::Silent),
    ("gone", State::Gone),
    ("releasing", State::Releasing),
    ("released", State::Released),
    ("refused", State::Refused),
    ("withdrawn", State::Withdrawn),
    ("expired", State::Expired),
    ("moved", State::Moved),
];

fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

/// Metrics, one after the other. Names are without what their kind adds: `_total`.
struct Exposition<'a>(DescriptorEncoder<'a>);

impl Exposition<'_> {
    fn begin(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        write: impl FnOnce(MetricEncoder<'_>) -> Result<(), fmt::Error>,
    ) -> Result<(), fmt::Error> {
        write(self.0.encode_descriptor(name, help, None, kind)?)
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> Result<(), fmt::Error> {
        self.begin(name, help, MetricType::Gauge, |mut out| {
            out.encode_gauge(&value)
        })
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) -> Result<(), fmt::Error> {
        self.begin(name, help, MetricType::Counter, |mut out| {
            out.encode_counter::<NoLabelSet, _, f64>(&value, None)
        })
    }

    fn gauges<'b>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'b str, f64)>,
    ) -> Result<(), fmt::Error> {
        self.begin(name, help, MetricType::Gauge, |mut out| {
            for (of, value) in values {
                out.encode_family(&[(label, of)])?.encode_gauge(&value)?;
            }
            Ok(())
        })
    }

    fn counters<'b>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'b str, f64)>,
    ) -> Result<(), fmt::Error> {
        self.begin(name, help, MetricType::Counter, |mut out| {
            for (of, value) in values {
                out.encode_family(&[(label, of)])?
                    .encode_counter::<NoLabelSet, _, f64>(&value, None)?;
            }
            Ok(())
        })
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        histogram: &Histogram,
    ) -> Result<(), fmt::Error> {
        self.begin(name, help, MetricType::Histogram, |out| {
            histogram.encode(out)
        })
    }
}

/// OpenMetrics names a counter without `_total` where it describes it, and ends with `# EOF`; the
/// format before it does neither, and is what `promtool check metrics` reads.
fn classic(text: &str) -> String {
    let counters: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        let described = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                Some(format!("# {what} {name}_total {rest}"))
            }
            _ => None,
        };
        out.push_str(described.as_deref().unwrap_or(line));
        out.push('\n');
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use jiff::Timestamp;

    use super::*;

    pub(crate) fn snapshot() -> Snapshot {
        let reclaims = Reclaims::default();
        reclaims.took(Duration::from_millis(2500));
        Snapshot {
            stats: StatsView {
                version: "0.1.0".to_owned(),
                started_at: Timestamp::from_second(1_700_000_000).unwrap(),
                dry_run: false,
                paused: None,
                breaker_open_since: Some(Timestamp::UNIX_EPOCH),
                bridges: vec!["br0".to_owned()],
                ports: 2,
                bindings: BTreeMap::from([(State::Bound, 2), (State::Released, 1)]),
                counters: BTreeMap::from([
                    ("core.releases_sent".to_owned(), 7),
                    ("core.held_hold_down".to_owned(), 3),
                    ("core.probes_sent".to_owned(), 9),
                    ("core.probes_failed".to_owned(), 2),
                ]),
            },
            ports: vec![Role::Vm, Role::Vm, Role::Uplink],
            blind: 1,
            imports: 4,
            queue: 5,
            programs: vec![ProgramStats {
                name: "vm_ingress".to_owned(),
                runs: 10,
                time: Duration::from_millis(1500),
            }],
            reclaims,
            clients_refused: 0,
        }
    }

    #[test]
    fn figures_have_their_names() {
        let text = snapshot().text().unwrap();
        for line in [
            "# TYPE dhcp_reclaim_bindings gauge",
            "dhcp_reclaim_bindings{state=\"bound\"} 2.0",
            "dhcp_reclaim_bindings{state=\"gone\"} 0.0",
            "# TYPE dhcp_reclaim_releases_total counter",
            "dhcp_reclaim_releases_total{outcome=\"sent\"} 7.0",
            "dhcp_reclaim_holds_total{gate=\"hold-down\"} 3.0",
            "dhcp_reclaim_probes_total{result=\"sent\"} 7.0",
            "dhcp_reclaim_ports{role=\"vm\"} 2.0",
            "dhcp_reclaim_breaker_open 1.0",
            "dhcp_reclaim_paused 0.0",
            "dhcp_reclaim_bpf_run_seconds_total{program=\"vm_ingress\"} 1.5",
            "dhcp_reclaim_reclaim_seconds_bucket{le=\"2.0\"} 0",
            "dhcp_reclaim_reclaim_seconds_bucket{le=\"3.0\"} 1",
            "dhcp_reclaim_reclaim_seconds_sum 2.5",
            "dhcp_reclaim_stats_total{name=\"core.probes_sent\"} 9.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("EOF"), "{text}");
    }
}
