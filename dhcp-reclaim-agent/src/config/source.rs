//! Where settings come from, so that they can be read again while the agent runs.

use std::path::PathBuf;

use super::{ConfigError, Options, Settings};

#[derive(Clone, Debug, Default)]
pub struct Source {
    pub flags: Options,
    pub file: Option<PathBuf>,
}

impl Source {
    pub fn load(&self) -> Result<Settings, ConfigError> {
        Settings::load(self.flags.clone(), self.file.as_deref())
    }
}

impl Settings {
    /// These settings with what `wanted` says, as far as a running agent can follow it; or the keys
    /// of what it cannot: then nothing of it is taken over, so that what runs is always one file's.
    pub fn changed_to(&self, wanted: &Self) -> Result<Self, Vec<&'static str>> {
        let followed = Self {
            dry_run: wanted.dry_run,
            silence: wanted.silence,
            probe_rate: wanted.probe_rate,
            probe_interval: wanted.probe_interval,
            misses: wanted.misses,
            hold_down: wanted.hold_down,
            hold_down_uplink: wanted.hold_down_uplink,
            hold_down_silent: wanted.hold_down_silent,
            port_up: wanted.port_up,
            settle: wanted.settle,
            min_remaining: wanted.min_remaining,
            breaker: wanted.breaker,
            breaker_min: wanted.breaker_min,
            breaker_window: wanted.breaker_window,
            rate: wanted.rate,
            burst: wanted.burst,
            record_rate: wanted.record_rate,
            record_burst: wanted.record_burst,
            bindings_per_port: wanted.bindings_per_port,
            leasequery: wanted.leasequery,
            ..self.clone()
        };
        if followed == *wanted {
            return Ok(followed);
        }
        let apart = self.at_start(wanted).into_iter().filter(|(_, same)| !same);
        let mut keys: Vec<&str> = apart.map(|(key, _)| key).collect();
        if keys.is_empty() {
            keys.push("a setting of the start");
        }
        Err(keys)
    }

    /// The keys that a running agent cannot follow, and whether `wanted` has the same.
    pub fn at_start(&self, wanted: &Self) -> [(&'static str, bool); 14] {
        [
            ("bridge", self.bridges == wanted.bridges),
            ("port", self.ports == wanted.ports),
            ("uplink", self.uplinks == wanted.uplinks),
            ("hook", self.hook == wanted.hook),
            ("commit", self.commit == wanted.commit),
            ("bpffs", self.bpffs == wanted.bpffs),
            ("control", self.control == wanted.control),
            ("state", self.state == wanted.state),
            ("sandbox", self.sandbox == wanted.sandbox),
            ("expedite", self.expedite == wanted.expedite),
            ("import", self.imports == wanted.imports),
            ("ask-server", self.ask_servers == wanted.ask_servers),
            ("metrics", self.metrics == wanted.metrics),
            (
                "detach-on-exit",
                self.detach_on_exit == wanted.detach_on_exit,
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, time::Duration};

    use super::*;

    fn parse(text: &str) -> Settings {
        Settings::parse(Options::default(), Path::new("/c"), text).unwrap()
    }

    #[test]
    fn a_file_is_read_again_and_flags_still_win() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let source = Source {
            flags: Options {
                bridge: vec!["br0".to_owned()],
                rate: Some(7),
                ..Options::default()
            },
            file: Some(file.clone()),
        };
        fs::write(&file, "hold-down = \"3s\"\nrate = 9\n").unwrap();
        let first = source.load().unwrap();
        fs::write(&file, "hold-down = \"4s\"\n").unwrap();
        let second = source.load().unwrap();
        assert_eq!((first.rate, second.rate), (7, 7));
        let now = first.changed_to(&second).unwrap();
        assert_eq!(now, second);
        assert_eq!(now.hold_down, Duration::from_secs(4));
    }

    #[test]
    fn what_a_running_agent_cannot_follow_is_named_and_nothing_is_taken_over() {
        let runs = parse("bridge = [\"br0\"]\n");
        for (text, keys) in [
            ("bridge = [\"br0\", \"br1\"]", &["bridge"][..]),
            ("bridge = [\"br0\"]\nport = [\"tap*\"]", &["port"]),
            ("bridge = [\"br0\"]\nuplink = [\"x\"]", &["uplink"]),
            ("bridge = [\"br0\"]\nhook = \"xdp\"", &["hook"]),
            ("bridge = [\"br0\"]\ncommit = \"request\"", &["commit"]),
            ("bridge = [\"br0\"]\nbpffs = \"/b\"", &["bpffs"]),
            ("bridge = [\"br0\"]\ncontrol = \"/c\"", &["control"]),
            ("bridge = [\"br0\"]\nstate = \"/s\"", &["state"]),
            ("bridge = [\"br0\"]\nsandbox = \"off\"", &["sandbox"]),
            (
                "bridge = [\"br0\"]\ndetach-on-exit = true",
                &["detach-on-exit"],
            ),
            (
                "bridge = [\"br1\"]\nhook = \"xdp\"\nrate = 1",
                &["bridge", "hook"],
            ),
        ] {
            assert_eq!(runs.changed_to(&parse(text)), Err(keys.to_vec()), "{text}");
        }
    }
}
