//! What the agent is told to do: flags over a TOML file over defaults, checked once.

#![forbid(unsafe_code)]

mod source;
mod span;

use std::{
    fmt, fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, ValueEnum};
use serde::{Deserialize, de};

pub use self::{
    source::Source,
    span::{ParseSpanError, Span},
};
use crate::{
    core::{self, Policy},
    leasefile::{ImportSpec, PlaceError},
    ports::{Glob, PortRules},
};

pub const DEFAULT_CONTROL: &str = "/run/dhcp-reclaim/control.sock";
const DEFAULT_STATE: &str = "/var/lib/dhcp-reclaim";
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// How the agent behaves; every value is within its bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Bridges to follow; at least one.
    pub bridges: Vec<String>,
    pub ports: Vec<Glob>,
    pub uplinks: Vec<Glob>,
    pub hook: Hook,
    pub commit: Commit,
    pub bpffs: PathBuf,
    pub control: PathBuf,
    /// Folder of the agent's own memory.
    pub state: PathBuf,
    /// A stop takes the kernel half along; else it listens on for the next agent.
    pub detach_on_exit: bool,
    /// The kernel is told to hurry while programs are attached.
    pub expedite: bool,
    pub dry_run: bool,
    pub sandbox: Sandbox,

    /// Without a frame for this long, an address is probed.
    pub silence: Duration,
    /// Quiet addresses that are looked at in a second, at most.
    pub probe_rate: u32,
    /// Between probe rounds on a port that is up, and while something keeps a dead VM's address.
    pub probe_interval: Duration,
    /// Rounds without an answer until an address is silent.
    pub misses: u32,
    /// Port lost, no uplink on the segment.
    pub hold_down: Duration,
    /// Port lost, the segment has an uplink: the VM may be moving.
    pub hold_down_uplink: Duration,
    /// Port up, address silent.
    pub hold_down_silent: Duration,
    pub port_up: PortUp,
    /// After the start and after its links changed, nothing is released for this long.
    pub settle: Duration,
    /// A lease that ends sooner is left to end.
    pub min_remaining: Duration,
    pub breaker: Breaker,
    /// The breaker needs at least this many bindings to judge.
    pub breaker_min: u32,
    pub breaker_window: Duration,
    /// RELEASEs a second to one server, and how many at once.
    pub rate: u32,
    pub burst: u32,
    /// DHCP records a second and at once, per port.
    pub record_rate: u16,
    pub record_burst: u16,
    pub bindings_per_port: u32,
    pub leasequery: LeaseQuery,
    /// Lease files that are read at the start.
    pub imports: Vec<ImportSpec>,
    /// Servers that are asked for the leases of VMs that are there at the start.
    pub ask_servers: Vec<Ipv4Addr>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            bridges: Vec::new(),
            ports: Vec::new(),
            uplinks: Vec::new(),
            hook: Hook::Tc,
            commit: Commit::Ack,
            bpffs: PathBuf::from(DEFAULT_BPFFS),
            control: PathBuf::from(DEFAULT_CONTROL),
            state: PathBuf::from(DEFAULT_STATE),
            detach_on_exit: false,
            expedite: false,
            dry_run: false,
            sandbox: Sandbox::Enforce,
            silence: Duration::from_secs(30),
            probe_rate: 100,
            probe_interval: Duration::from_secs(10),
            misses: 3,
            hold_down: Duration::from_secs(2),
            hold_down_uplink: Duration::from_secs(10),
            hold_down_silent: Duration::from_mins(5),
            port_up: PortUp::Release,
            settle: Duration::from_secs(3),
            min_remaining: Duration::from_secs(10),
            breaker: Breaker::Fraction(0.5),
            breaker_min: 32,
            breaker_window: Duration::from_mins(1),
            rate: 50,
            burst: 32,
            record_rate: 15,
            record_burst: 60,
            bindings_per_port: 256,
            leasequery: LeaseQuery::Auto,
            imports: Vec::new(),
            ask_servers: Vec::new(),
            metrics: None,
        }
    }
}

/// Where the programs attach to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// Sees both directions: tcx, or clsact before Linux 6.6.
    Tc,
    /// Sees both directions, on every kernel by clsact.
    Clsact,
    /// Sees only what comes in; VM ports then show requests but no answers.
    Xdp,
}

/// What makes a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Commit {
    /// The server's ACK.
    Ack,
    /// The VM's REQUEST, where answers cannot be seen.
    Request,
}

/// What happens to a silent address whose port is still up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PortUp {
    /// It is released after `hold-down-silent`.
    Release,
    /// Nothing: its lease runs until it expires.
    Never,
}

/// Whether servers are asked what became of a RELEASE (RFC 4388).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseQuery {
    /// Those that answer, where the bridge has an address to ask from.
    Auto,
    Off,
}

/// What a running agent gives up of its privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// All that it does not need.
    Enforce,
    /// Capabilities only; the kernel logs system calls that it should not need.
    Log,
    Off,
}

/// How large a part of the node's bindings may die in one window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Breaker {
    Off,
    /// Above 0, at most 1.
    Fraction(f64),
}

/// What flags or a file say; names in both are the same.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// Bridge to follow, there already or not; may be repeated
    #[arg(long, value_name = "NAME")]
    pub bridge: Vec<String>,
    /// VM ports, by name or glob; may be repeated. A whole name makes any link a VM's port
    /// [default: taps, veths and the like]
    ///
    /// At the others no lease is learned and no server believed, but a VM that moves there is seen.
    #[arg(long, value_name = "GLOB")]
    pub port: Vec<Glob>,
    /// Ports that lead to other hosts, besides physical links, bonds, VLANs and tunnels; may be
    /// repeated
    ///
    /// Stronger than `port`.
    #[arg(long, value_name = "GLOB")]
    pub uplink: Vec<Glob>,
    /// Where to attach to a port [default: tc]
    ///
    /// `tc` sees both directions, by tcx, or by clsact before Linux 6.6. `clsact` is that on any
    /// kernel: it attaches at once, where tcx takes 30 ms and holds up who makes links meanwhile; but
    /// what others do to a clsact is done to ours, too. `xdp` sees only what comes in: use it with
    /// `commit = "request"`, or where an uplink shows the answers.
    #[arg(long, value_name = "HOOK")]
    pub hook: Option<Hook>,
    /// What makes a binding: the server's ACK, or the VM's REQUEST alone [default: ack]
    ///
    /// With `request`, nothing is released for an address that was never seen alive at its own port.
    #[arg(long, value_name = "WHAT")]
    pub commit: Option<Commit>,
    /// Mount point of the BPF file system [default: /sys/fs/bpf]
    ///
    /// Of this one and of the two that follow: the unit of the package writes nowhere else; another path
    /// takes a drop-in with `ReadWritePaths=`, and is yours to remove.
    #[arg(long, value_name = "PATH")]
    pub bpffs: Option<PathBuf>,
    /// Socket that the other commands talk to, for root only
    /// [default: /run/dhcp-reclaim/control.sock]
    #[arg(long, value_name = "PATH", env = "DHCP_RECLAIM_CONTROL")]
    pub control: Option<PathBuf>,
    /// Folder for what must outlive the agent: leases and the audit trail
    /// [default: /var/lib/dhcp-reclaim]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Leave nothing in the kernel when the agent stops; else the programs go on listening, so that
    /// a restart or an upgrade misses nothing [default: false]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_name = "BOOL", hide_possible_values = true)]
    pub detach_on_exit: Option<bool>,
    /// Have the kernel hurry while a port's programs are attached: 0.3 ms instead of 30 for each port
    /// [default: false]
    ///
    /// By /sys/kernel/rcu_expedited, which is set for those moments and interrupts every busy processor
    /// twice for a port. Without it, VMs that start by the dozen in one second may have their leases
    /// before their ports are watched, and are known at the next renewal. `hook = "clsact"` needs none
    /// of it.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_name = "BOOL", hide_possible_values = true)]
    pub expedite: Option<bool>,
    /// Do everything except send a RELEASE, and say what would have been sent [default: false]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_name = "BOOL", hide_possible_values = true)]
    pub dry_run: Option<bool>,

    /// What is done about system calls and paths that the agent does not need [default: enforce]
    ///
    /// `log` lets the kernel log such system calls instead of ending the agent, and leaves paths alone;
    /// `off` keeps all privileges. See [security.md](security.md).
    #[arg(long, value_name = "HOW")]
    pub sandbox: Option<Sandbox>,

    /// Probe an address that has sent nothing for this long [default: 30s]
    ///
    /// Or for a part of it above half that differs by address and time, so that not all are asked at
    /// once. Shorter finds the dead sooner and asks the quiet more often; the busy are never asked.
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub silence: Option<Span>,
    /// Quiet addresses that are looked at in a second, at most [default: 100]
    ///
    /// What this costs the node is bounded so: with more addresses than this times `silence`, each is
    /// looked at less often. A VM whose port goes is looked for at once, however many there are.
    #[arg(long, value_name = "COUNT", help_heading = "When a VM is dead")]
    pub probe_rate: Option<u32>,
    /// Between probe rounds on a port that is up [default: 10s]
    ///
    /// As often a dead VM is asked whose address something keeps: its server's pace, a pause, any gate.
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub probe_interval: Option<Span>,
    /// Unanswered rounds until an address counts as silent [default: 3]
    ///
    /// On both roads: with its port lost, and with its port up.
    #[arg(long, value_name = "COUNT", help_heading = "When a VM is dead")]
    pub misses: Option<u32>,
    /// Port deleted, or a tap's carrier lost, no uplink on the bridge: silence until the VM is gone
    /// [default: 2s]
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub hold_down: Option<Span>,
    /// The same where the bridge has an uplink, so that the VM may be moving [default: 10s]
    ///
    /// It must be longer than a live migration needs to show up at its target.
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub hold_down_uplink: Option<Span>,
    /// Port up but silent: a paused or rebooting VM looks like this [default: 5m]
    ///
    /// It must be longer than pauses, reboots and crash dumps take. The same is waited for where a port
    /// was taken off the bridge or set down, a veth's far end is down, or the port went while no agent
    /// ran.
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub hold_down_silent: Option<Span>,
    /// Whether a silent address is released while its port is up [default: release]
    ///
    /// `never` leaves it alone for as long as its port is up.
    #[arg(long, value_name = "WHAT", help_heading = "When a VM is dead")]
    pub port_up: Option<PortUp>,
    /// Release nothing for this long after the start, or after an uplink came or went [default: 3s]
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub settle: Option<Span>,
    /// Leave a lease alone that ends within this [default: 10s]
    #[arg(long, value_name = "SPAN", help_heading = "When a VM is dead")]
    pub min_remaining: Option<Span>,

    /// Stop if more than this part of all bindings dies in one window; or `off` [default: 0.5]
    ///
    /// If more die, the agent is more likely blind than they are dead: it stops releasing until enough
    /// come back, or `dhcp-reclaim resume` is said. `off` is for nodes that are emptied on purpose.
    #[arg(long, value_name = "FRACTION", help_heading = "Limits")]
    pub breaker: Option<Breaker>,
    /// Deaths in one window that never open the breaker [default: 32]
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub breaker_min: Option<u32>,
    /// The breaker's window [default: 1m]
    #[arg(long, value_name = "SPAN", help_heading = "Limits")]
    pub breaker_window: Option<Span>,
    /// RELEASEs a second to a server that does not show how far it has read [default: 50]
    ///
    /// One that answers DHCPINFORMs from the bridge's own address, or is this host, shows it, and is sent
    /// as many as it has read.
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub rate: Option<u32>,
    /// RELEASEs on their way to one server [default: 32]
    ///
    /// Servers lose what they have no room for, in silence: dnsmasq has room for 166, from all nodes.
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub burst: Option<u32>,
    /// DHCP messages a second that one port may have recorded [default: 15]
    ///
    /// What is beyond is counted, and makes the port's bindings uncertain until they are seen again.
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub record_rate: Option<u16>,
    /// DHCP messages at once that one port may have recorded [default: 60]
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub record_burst: Option<u16>,
    /// Addresses that one port may hold [default: 256]
    #[arg(long, value_name = "COUNT", help_heading = "Limits")]
    pub bindings_per_port: Option<u32>,
    /// Ask servers that answer what became of a RELEASE, by DHCPLEASEQUERY from the bridge's own
    /// address [default: auto]
    #[arg(long, value_name = "WHETHER")]
    pub leasequery: Option<LeaseQuery>,
    /// Lease file of VMs that run already: PATH,server=IP and what else it takes of bridge=NAME,
    /// vlan=N, server-mac=MAC, format=F (see `dhcp-reclaim import`); may be repeated
    #[arg(long, value_name = "SPEC")]
    pub import: Vec<ImportSpec>,
    /// Ask this server for the leases of VMs that are there at the start, by DHCPLEASEQUERY from the
    /// bridge's own address; may be repeated
    ///
    /// By the MACs that the bridge has learned at VM ports, for five minutes. What it answers is worth as
    /// much as an imported lease: nothing is released before its VM was seen alive.
    #[arg(long, value_name = "IP")]
    pub ask_server: Vec<Ipv4Addr>,
    /// Serve metrics for Prometheus there, by HTTP and to whoever can connect, as in
    /// 127.0.0.1:9798 [default: not served]
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
}

/// All keys of a file, as in [`Options`].
const KEYS: [&str; 34] = [
    "bridge",
    "port",
    "uplink",
    "hook",
    "commit",
    "bpffs",
    "control",
    "state",
    "detach-on-exit",
    "expedite",
    "dry-run",
    "sandbox",
    "silence",
    "probe-rate",
    "probe-interval",
    "misses",
    "hold-down",
    "hold-down-uplink",
    "hold-down-silent",
    "port-up",
    "settle",
    "min-remaining",
    "breaker",
    "breaker-min",
    "breaker-window",
    "rate",
    "burst",
    "record-rate",
    "record-burst",
    "bindings-per-port",
    "leasequery",
    "import",
    "ask-server",
    "metrics",
];

/// The settings cannot be used; says where, what and how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        path: PathBuf,
        line: usize,
        column: usize,
        message: String,
    },
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error("{place}: {problem}; {mend}")]
    Value {
        place: Place,
        problem: String,
        mend: &'static str,
    },
}

/// A lease file does not say it all.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct ImportError {
    pub path: PathBuf,
    pub source: PlaceError,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Flag(&'static str),
    File {
        path: PathBuf,
        line: usize,
        key: &'static str,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(key) => write!(f, "--{key}"),
            Self::File { path, line, key } => write!(f, "{}:{line}: `{key}`", path.display()),
        }
    }
}

impl Settings {
    /// What the flags say, else the file, else the defaults.
    pub fn load(flags: Options, file: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = file else {
            return Self::resolve(flags, None);
        };
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(flags, path, &text)
    }

    /// The same with the file's text; `path` is for errors.
    pub fn parse(flags: Options, path: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::resolve(flags, Some(&File::parse(path, text)?))
    }

    pub fn port_rules(&self) -> PortRules {
        PortRules {
            bridges: self.bridges.clone(),
            ports: self.ports.clone(),
            uplinks: self.uplinks.clone(),
        }
    }

    /// What the core is told of it.
    pub fn policy(&self) -> Policy {
        Policy {
            commit: match self.commit {
                Commit::Ack => core::Commit::Ack,
                Commit::Request => core::Commit::Request,
            },
            silence: self.silence,
            probe_rate: self.probe_rate,
            probe_interval: self.probe_interval,
            misses: self.misses,
            hold_down: self.hold_down,
            hold_down_uplink: self.hold_down_uplink,
            hold_down_silent: self.hold_down_silent,
            release_while_port_up: match self.port_up {
                PortUp::Release => true,
                PortUp::Never => false,
            },
            settle: self.settle,
            min_remaining: self.min_remaining,
            breaker: match self.breaker {
                Breaker::Off => None,
                Breaker::Fraction(share) => Some(share),
            },
            breaker_min: usize::try_from(self.breaker_min).unwrap_or(usize::MAX),
            breaker_window: self.breaker_window,
            rate: self.rate,
            burst: self.burst,
            bindings_per_port: usize::try_from(self.bindings_per_port).unwrap_or(usize::MAX),
            leasequery: self.leasequery == LeaseQuery::Auto,
            blind_to_tags: self.hook == Hook::Xdp,
            ..Policy::default()
        }
    }

    fn resolve(flags: Options, file: Option<&File<'_>>) -> Result<Self, ConfigError> {
        let in_flags = flags.clone();
        let below = file.map(|file| file.options.clone()).unwrap_or_default();
        let default = Self::default();
        macro_rules! pick {
            ($key:ident) => {
                flags.$key.or(below.$key).unwrap_or(default.$key)
            };
        }
        macro_rules! span {
            ($key:ident) => {
                flags
                    .$key
                    .or(below.$key)
                    .map_or(default.$key, Duration::from)
            };
        }
        fn list<T>(flags: Vec<T>, below: Vec<T>) -> Vec<T> {
            if flags.is_empty() { below } else { flags }
        }
        let hold_down = span!(hold_down);
        // A longer hold-down raises those of the more doubtful cases, unless they are given.
        macro_rules! longer_hold_down {
            ($key:ident) => {
                flags
                    .$key
                    .or(below.$key)
                    .map_or(default.$key.max(hold_down), Duration::from)
            };
        }
        let settings = Self {
            bridges: list(flags.bridge, below.bridge),
            ports: list(flags.port, below.port),
            uplinks: list(flags.uplink, below.uplink),
            hook: pick!(hook),
            commit: pick!(commit),
            bpffs: pick!(bpffs),
            control: pick!(control),
            state: pick!(state),
            detach_on_exit: pick!(detach_on_exit),
            expedite: pick!(expedite),
            dry_run: pick!(dry_run),
            sandbox: pick!(sandbox),
            silence: span!(silence),
            probe_rate: pick!(probe_rate),
            probe_interval: span!(probe_interval),
            misses: pick!(misses),
            hold_down,
            hold_down_uplink: longer_hold_down!(hold_down_uplink),
            hold_down_silent: longer_hold_down!(hold_down_silent),
            port_up: pick!(port_up),
            settle: span!(settle),
            min_remaining: span!(min_remaining),
            breaker: pick!(breaker),
            breaker_min: pick!(breaker_min),
            breaker_window: span!(breaker_window),
            rate: pick!(rate),
            burst: pick!(burst),
            record_rate: pick!(record_rate),
            record_burst: pick!(record_burst),
            bindings_per_port: pick!(bindings_per_port),
            leasequery: pick!(leasequery),
            imports: list(flags.import, below.import),
            ask_servers: list(flags.ask_server, below.ask_server),
            metrics: flags.metrics.or(below.metrics),
        };
        let Some((key, problem, mend)) = settings.problem() else {
            return Ok(settings);
        };
        let place = match file.and_then(|file| file.place(key, &in_flags)) {
            Some(place) => place,
            None => Place::Flag(key),
        };
        Err(ConfigError::Value {
            place,
            problem,
            mend,
        })
    }

    /// The first value that makes no sense: its key, what is wrong, and the mend.
    fn problem(&self) -> Option<(&'static str, String, &'static str)> {
        const BLINK: Duration = Duration::from_millis(200);
        const DAY: Duration = Duration::from_hours(24);

        if self.bridges.is_empty() {
            return Some((
                "bridge",
                "no bridge to follow".to_owned(),
                "name at least one, as in `--bridge br0` or `bridge = [\"br0\"]`",
            ));
        }
        for name in &self.bridges {
            let plain = name.parse::<Glob>().is_ok_and(|glob| glob.is_literal());
            if !plain {
                let name = name.escape_debug();
                let problem = format!("`{name}` cannot be a bridge's name");
                return Some((
                    "bridge",
                    problem,
                    "give a whole name of at most 15 characters",
                ));
            }
        }

        // A VM must have the time to answer, and nobody waits longer than a day by intent.
        for (key, value, least) in [
            ("silence", self.silence, Duration::from_secs(1)),
            ("probe-interval", self.probe_interval, BLINK),
            ("hold-down", self.hold_down, BLINK),
            ("hold-down-uplink", self.hold_down_uplink, BLINK),
            ("hold-down-silent", self.hold_down_silent, BLINK),
            ("settle", self.settle, Duration::ZERO),
            ("min-remaining", self.min_remaining, Duration::ZERO),
            (
                "breaker-window",
                self.breaker_window,
                Duration::from_secs(1),
            ),
        ] {
            if value < least {
                let problem = format!("{} is below {}", Span(value), Span(least));
                return Some((
                    key,
                    problem,
                    "a living VM could be taken for dead; give more",
                ));
            }
            if value > DAY {
                return Some((key, format!("{} is over a day", Span(value)), "give less"));
            }
        }
        for (key, shorter, other, longer) in [
            (
                "hold-down-uplink",
                self.hold_down_uplink,
                "hold-down",
                self.hold_down,
            ),
            (
                "hold-down-silent",
                self.hold_down_silent,
                "hold-down",
                self.hold_down,
            ),
        ] {
            if shorter < longer {
                let (shorter, longer) = (Span(shorter), Span(longer));
                let problem = format!("{shorter} is shorter than `{other}`, which is {longer}");
                return Some((key, problem, "the doubtful case must not be the faster one"));
            }
        }

        for (key, value) in [
            ("misses", self.misses),
            ("probe-rate", self.probe_rate),
            ("rate", self.rate),
            ("burst", self.burst),
            ("record-rate", self.record_rate.into()),
            ("record-burst", self.record_burst.into()),
            ("bindings-per-port", self.bindings_per_port),
        ] {
            if value == 0 {
                return Some((key, "zero".to_owned(), "give 1 or more"));
            }
        }
        for (key, path) in [
            ("bpffs", &self.bpffs),
            ("control", &self.control),
            ("state", &self.state),
        ] {
            if !path.is_absolute() {
                let problem = format!("`{}` is not an absolute path", path.display());
                return Some((key, problem, "start it with `/`"));
            }
        }
        None
    }
}

/// A file that was read, for saying where its values stand.
struct File<'a> {
    path: &'a Path,
    text: &'a str,
    options: Options,
}

impl<'a> File<'a> {
    fn parse(path: &'a Path, text: &'a str) -> Result<Self, ConfigError> {
        match toml::from_str(text) {
            Ok(options) => Ok(Self {
                path,
                text,
                options,
            }),
            Err(error) => Err(parse_error(path, text, &error)),
        }
    }

    /// Where the file has `key`, unless the flags said it.
    fn place(&self, key: &'static str, flags: &Options) -> Option<Place> {
        let in_flags = match key {
            "bridge" => !flags.bridge.is_empty(),
            "bpffs" => flags.bpffs.is_some(),
            "control" => flags.control.is_some(),
            "state" => flags.state.is_some(),
            "silence" => flags.silence.is_some(),
            "probe-rate" => flags.probe_rate.is_some(),
            "probe-interval" => flags.probe_interval.is_some(),
            "misses" => flags.misses.is_some(),
            "hold-down" => flags.hold_down.is_some(),
            "hold-down-uplink" => flags.hold_down_uplink.is_some(),
            "hold-down-silent" => flags.hold_down_silent.is_some(),
            "settle" => flags.settle.is_some(),
            "min-remaining" => flags.min_remaining.is_some(),
            "breaker-window" => flags.breaker_window.is_some(),
            "rate" => flags.rate.is_some(),
            "burst" => flags.burst.is_some(),
            "record-rate" => flags.record_rate.is_some(),
            "record-burst" => flags.record_burst.is_some(),
            "bindings-per-port" => flags.bindings_per_port.is_some(),
            "leasequery" => flags.leasequery.is_some(),
            _ => false,
        };
        if in_flags {
            return None;
        }
        let table = toml::de::DeTable::parse(self.text).ok()?;
        let (found, _) = table
            .get_ref()
            .iter()
            .find(|(found, _)| found.get_ref() == key)?;
        let (line, _) = position(self.text, found.span().start);
        Some(Place::File {
            path: self.path.to_owned(),
            line,
            key,
        })
    }
}

fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let (line, column) = error
        .span()
        .map_or((1, 1), |span| position(text, span.start));
    let mut message = error.message().trim_end().replace('\n', ", ");
    // serde's own list of all keys helps nobody; the nearest ones do.
    if let Some(key) = message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split('`').next())
    {
        let near = nearest(key);
        let key = key.escape_debug();
        message = format!("unknown key `{key}`; did you mean {near}?");
    } else if let Some(key) = key_of_line(text, line) {
        message = format!("`{key}`: {message}");
    }
    ConfigError::Parse {
        path: path.to_owned(),
        line,
        column,
        message,
    }
}

/// The known key that a line sets.
fn key_of_line(text: &str, line: usize) -> Option<&'static str> {
    let (key, _) = text.lines().nth(line.checked_sub(1)?)?.split_once('=')?;
    KEYS.into_iter().find(|known| *known == key.trim())
}

/// Line and column, from one, of a byte; columns count characters.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (line, before[start..].chars().count() + 1)
}

/// The known keys that look most like `key`, quoted and joined.
fn nearest(key: &str) -> String {
    let plain = |key: &str| key.to_lowercase().replace(['_', '-'], "");
    let wanted = plain(key);
    let mut ranked: Vec<_> = KEYS
        .iter()
        .map(|known| {
            let known_plain = plain(known);
            // One within the other is as good as a slip of the finger.
            let inside = wanted.len() > 2
                && (known_plain.contains(&wanted) || wanted.contains(&known_plain));
            let distance = edit_distance(&wanted, &known_plain);
            (
                if inside { distance.min(2) } else { distance },
                distance,
                *known,
            )
        })
        .collect();
    ranked.sort_unstable();
    let best = ranked[0].0;
    let near: Vec<_> = ranked
        .iter()
        .filter(|(rank, ..)| *rank <= best.max(2))
        .take(4)
        .map(|(.., known)| format!("`{known}`"))
        .collect();
    near.join(" or ")
}

/// Levenshtein's.
fn edit_distance(a: &str, b: &str) -> usize {
    // A key is as long as its author likes; ours are not.
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, right) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Neither `off` nor a fraction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no breaker: write a fraction above 0 and up to 1, as in 0.5, or `off`")]
pub struct ParseBreakerError(String);

impl FromStr for Breaker {
    type Err = ParseBreakerError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let fraction: Option<f64> = text.parse().ok();
        fraction
            .filter(|fraction| *fraction > 0.0 && *fraction <= 1.0)
            .map(Self::Fraction)
            .ok_or_else(|| ParseBreakerError(text.escape_debug().to_string()))
    }
}

impl<'de> Deserialize<'de> for Breaker {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Breaker;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a fraction above 0 and up to 1, or \"off\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Breaker, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_f64<E: de::Error>(self, fraction: f64) -> Result<Breaker, E> {
                self.visit_str(&fraction.to_string())
            }

            fn visit_i64<E: de::Error>(self, fraction: i64) -> Result<Breaker, E> {
                self.visit_str(&fraction.to_string())
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, flags: Options) -> Result<Settings, ConfigError> {
        Settings::resolve(flags, Some(&File::parse(Path::new("/etc/dr.toml"), text)?))
    }

    fn error(text: &str) -> String {
        load(text, Options::default()).unwrap_err().to_string()
    }

    fn br0() -> Options {
        Options {
            bridge: vec!["br0".to_owned()],
            ..Options::default()
        }
    }

    #[test]
    fn a_bridge_is_all_that_is_needed() {
        let settings = Settings::resolve(br0(), None).unwrap();
        let expected = Settings {
            bridges: vec!["br0".to_owned()],
            ..Settings::default()
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn every_key_of_a_file_is_read() {
        let text = r#"
            bridge = ["br0", "br1"]
            port = ["vnet*"]
            uplink = ["eth0"]
            hook = "xdp"
            commit = "request"
            bpffs = "/bpf"
            control = "/tmp/c.sock"
            state = "/tmp/state"
            detach-on-exit = true
            expedite = true
            dry-run = true
            sandbox = "log"
            silence = "20s"
            probe-rate = 70
            probe-interval = "500ms"
            misses = 4
            hold-down = "3s"
            hold-down-uplink = "11s"
            hold-down-silent = "1h30m"
            port-up = "never"
            settle = "0s"
            min-remaining = "1m"
            breaker = "off"
            breaker-min = 5
            breaker-window = "2m"
            rate = 7
            burst = 8
            record-rate = 9
            record-burst = 10
            bindings-per-port = 11
            leasequery = "off"
            import = ["/l,server=10.0.0.1"]
            ask-server = ["10.0.0.1", "10.0.0.2"]
            metrics = "127.0.0.1:9798"
        "#;
        let settings = load(text, Options::default()).unwrap();
        let expected = Settings {
            bridges: vec!["br0".to_owned(), "br1".to_owned()],
            ports: vec!["vnet*".parse().unwrap()],
            uplinks: vec!["eth0".parse().unwrap()],
            hook: Hook::Xdp,
            commit: Commit::Request,
            bpffs: "/bpf".into(),
            control: "/tmp/c.sock".into(),
            state: "/tmp/state".into(),
            detach_on_exit: true,
            expedite: true,
            dry_run: true,
            sandbox: Sandbox::Log,
            silence: Duration::from_secs(20),
            probe_rate: 70,
            probe_interval: Duration::from_millis(500),
            misses: 4,
            hold_down: Duration::from_secs(3),
            hold_down_uplink: Duration::from_secs(11),
            hold_down_silent: Duration::from_secs(5400),
            port_up: PortUp::Never,
            settle: Duration::ZERO,
            min_remaining: Duration::from_secs(60),
            breaker: Breaker::Off,
            breaker_min: 5,
            breaker_window: Duration::from_secs(120),
            rate: 7,
            burst: 8,
            record_rate: 9,
            record_burst: 10,
            bindings_per_port: 11,
            leasequery: LeaseQuery::Off,
            imports: vec!["/l,server=10.0.0.1".parse().unwrap()],
            ask_servers: vec![Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)],
            metrics: Some(([127, 0, 0, 1], 9798).into()),
        };
        assert_eq!(settings, expected);
        for key in KEYS {
            assert!(text.contains(&format!("{key} = ")), "{key}");
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let text = "bridge = [\"br9\"]\nhold-down = \"4s\"\nmisses = 9\nbreaker = 1\n";
        let flags = Options {
            hold_down: Some("5s".parse().unwrap()),
            ..br0()
        };
        let settings = load(text, flags).unwrap();
        assert_eq!(settings.bridges, ["br0"]);
        assert_eq!(settings.hold_down, Duration::from_secs(5));
        assert_eq!(settings.misses, 9);
        assert_eq!(settings.breaker, Breaker::Fraction(1.0));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_neighbours() {
        assert_eq!(
            error("bridge = [\"br0\"]\n  hold_down = \"2s\"\n"),
            "/etc/dr.toml:2:3: unknown key `hold_down`; did you mean `hold-down` or \
             `hold-down-silent` or `hold-down-uplink`?"
        );
        assert_eq!(
            error("silense = \"2s\"\n"),
            "/etc/dr.toml:1:1: unknown key `silense`; did you mean `silence`?"
        );
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named_with_its_place() {
        for (text, place, part) in [
            ("hold-down = 2\n", "/etc/dr.toml:1:13: `hold-down`", "as in"),
            (
                "\nsilence = \"2\"\n",
                "/etc/dr.toml:2:11: `silence`",
                "unit",
            ),
            ("breaker = 1.5\n", "/etc/dr.toml:1:11: `breaker`", "up to 1"),
            (
                "hook = \"tcx\"\n",
                "/etc/dr.toml:1:8: `hook`",
                "`tc`, `clsact`, `xdp`",
            ),
            (
                "port = [\"a/b\"]\n",
                "/etc/dr.toml:1:",
                "names no interface",
            ),
            ("misses = -1\n", "/etc/dr.toml:1:10: `misses`", "-1"),
            ("misses = \n", "/etc/dr.toml:1:", "`misses`"),
        ] {
            let error = error(text);
            assert!(error.starts_with(place), "{text:?} gave {error}");
            assert!(error.contains(part), "{text:?} gave {error}");
        }
    }

    #[test]
    fn values_without_sense_are_refused_where_they_stand() {
        let with = |line: &str| format!("bridge = [\"br0\"]\n\n{line}\n");
        for (line, key) in [
            ("hold-down = \"100ms\"", "hold-down"),
            ("silence = \"0s\"", "silence"),
            ("hold-down-uplink = \"1s\"", "hold-down-uplink"),
            ("hold-down-silent = \"1s\"", "hold-down-silent"),
            ("settle = \"25h\"", "settle"),
            ("misses = 0", "misses"),
            ("rate = 0", "rate"),
            ("control = \"c.sock\"", "control"),
        ] {
            let error = error(&with(line));
            assert!(
                error.starts_with(&format!("/etc/dr.toml:3: `{key}`: ")),
                "{error}"
            );
        }
        assert!(error("").starts_with("--bridge: no bridge to follow"));
        assert!(error("bridge = [\"br*\"]").starts_with("/etc/dr.toml:1: `bridge`: "));
    }

    #[test]
    fn a_longer_hold_down_raises_the_others() {
        let flags = Options {
            hold_down: Some("30s".parse().unwrap()),
            ..br0()
        };
        let settings = load("", flags).unwrap();
        assert_eq!(settings.hold_down_uplink, Duration::from_secs(30));
        assert_eq!(settings.hold_down_silent, Duration::from_mins(5));
    }

    #[test]
    fn a_flag_is_blamed_for_what_it_says() {
        let flags = Options {
            rate: Some(0),
            ..br0()
        };
        assert!(
            load("rate = 5\n", flags)
                .unwrap_err()
                .to_string()
                .starts_with("--rate: zero")
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Settings::load(br0(), Some(Path::new("/nonexistent/x.toml"))).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/x.toml");
    }
}
