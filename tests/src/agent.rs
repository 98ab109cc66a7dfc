//! The agent under test, run and asked as a user would.
use std::{
    env,
    ffi::OsString,
    fmt,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    str::FromStr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    clock::{Deadline, now, slowness},
    fixture::{BRIDGE, Mac, UPLINK},
    netns::NetNs,
    process::Process,
    sandbox::{BPFFS, DIR, find as find_program, run},
    server::Place,
    vm::{Client, Vm},
    watch::{tail, until},
    world::PATIENCE,
};

/// Where `cargo xtask` says that the agent is.
pub const BIN: &str = "DHCP_RECLAIM_BIN";

/// Where the agent of a sandbox keeps its memory.
pub const STATE: &str = "/run/lab/state";

const TIMES: [&str; 6] = [
    "--silence",
    "--probe-interval",
    "--hold-down",
    "--hold-down-uplink",
    "--hold-down-silent",
    "--settle",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Tc,
    Clsact,
    Xdp,
}

pub struct Agent {
    process: Process,
    control: PathBuf,
    events: Events,
}

/// How an agent is to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    args: Vec<OsString>,
    control: PathBuf,
    state: PathBuf,
    name: String,
    /// Of the node that it runs on, if that is not the sandbox's own.
    netns: Option<String>,
    /// Another build than the one under test.
    program: Option<PathBuf>,
    env: Vec<(&'static str, OsString)>,
    /// The only ones that it may have, as setpriv(1) names them.
    capabilities: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Binding {
    pub ip: Ipv4Addr,
    pub mac: String,
    pub state: String,
    pub port: Option<String>,
    pub server: Option<Ipv4Addr>,
    pub server_mac: Option<String>,
    #[serde(flatten)]
    pub rest: Value,
}

#[derive(Clone, Debug)]
pub struct Event {
    /// When its line was read.
    pub at: Instant,
    pub name: String,
    pub ip: Option<Ipv4Addr>,
    pub port: Option<String>,
    pub json: Value,
}

/// What a command said, and how it ended.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Answer {
    pub fn of(command: &mut Command) -> Result<Self> {
        let output = command.output().context("cannot run the agent's binary")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Self {
            code: output.status.code().context("killed")?,
            out: text(&output.stdout),
            err: text(&output.stderr),
        })
    }
}

/// `300ms` or `2s`, as long as it has to be here; `None` for what is no such time.
fn scaled_time(text: &str) -> Option<String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u32 = number.parse().ok()?;
    Some(format!("{}{unit}", number.checked_mul(slowness())?))
}

/// What `dhcp-reclaim events --follow` says, from its start on.
struct Events {
    follower: Child,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    events: Mutex<Vec<Event>>,
    more: Condvar,
}

impl Setup {
    pub fn new(place: Place, hook: Hook) -> Self {
        let mut setup = Self {
            args: Vec::new(),
            control: Path::new(DIR).join("control.sock"),
            state: STATE.into(),
            name: "agent".to_owned(),
            netns: None,
            program: None,
            env: Vec::new(),
            capabilities: None,
        }
        .args(&["--bridge", BRIDGE, "--bpffs", BPFFS]);
        if place == Place::Remote {
            setup = setup.args(&["--uplink", UPLINK]);
        }
        match hook {
            Hook::Tc => setup,
            Hook::Clsact => setup.args(&["--hook", "clsact"]),
            // XDP on the VMs' ports does not see what goes to them.
            Hook::Xdp => setup.args(&["--hook", "xdp", "--commit", "request"]),
        }
    }

    /// The same decisions as by default, in a tenth of the time.
    pub fn quick(self) -> Self {
        self.args(&[
            "--silence",
            "1s",
            "--probe-interval",
            "300ms",
            "--misses",
            "3",
            "--hold-down",
            "1s",
            "--hold-down-uplink",
            "1s",
            "--hold-down-silent",
            "2s",
            "--settle",
            "500ms",
        ])
    }

    /// More arguments. Times that a death takes are as long as everything else on this machine.
    pub fn args(mut self, args: &[&str]) -> Self {
        for arg in args {
            let flag = self.args.last().and_then(|flag| flag.to_str());
            let scaled = flag
                .is_some_and(|flag| TIMES.contains(&flag))
                .then(|| scaled_time(arg))
                .flatten();
            self.args
                .push(scaled.unwrap_or_else(|| (*arg).to_owned()).into());
        }
        self
    }

    /// Another node's agent: its own namespace, BPF file system, socket and log.
    pub fn on(mut self, netns: &NetNs, name: &str) -> Result<Self> {
        let bpffs = Path::new(DIR).join(format!("{name}-bpf"));
        std::fs::create_dir_all(&bpffs)?;
        run(Command::new("/bin/mount")
            .args(["-t", "bpf", "bpf"])
            .arg(&bpffs))?;
        for arg in &mut self.args {
            if arg == BPFFS {
                *arg = bpffs.clone().into();
            }
        }
        self.netns = Some(netns.path());
        Ok(self.named(name))
    }

    /// Another socket, memory and log, for a second agent.
    pub fn named(mut self, name: &str) -> Self {
        self.control = Path::new(DIR).join(format!("{name}.sock"));
        self.state = Path::new(DIR).join(format!("{name}.state"));
        name.clone_into(&mut self.name);
        self
    }

    /// Another socket, and nothing else.
    pub fn control(mut self, path: &str) -> Self {
        self.control = path.into();
        self
    }

    /// Another build than the one under test.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// A variable in its environment.
    pub fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// Without any other capabilities than these, `net_admin` and so on.
    pub fn capabilities(mut self, names: &[String]) -> Self {
        let kept = names.iter().map(|name| format!(",+{name}"));
        self.capabilities = Some(format!("-all{}", kept.collect::<String>()));
        self
    }

    pub fn command(&self) -> Result<Command> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(netns) = &self.netns {
            words.extend(["/usr/bin/nsenter".into(), format!("--net={netns}").into()]);
        }
        if let Some(kept) = &self.capabilities {
            let setpriv = find_program("setpriv").context("there is no setpriv (util-linux)")?;
            words.extend([setpriv.into(), format!("--bounding-set={kept}").into()]);
        }
        let program = self.program.clone();
        words.push(program.map_or_else(binary, Ok)?.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.arg("run").args(&self.args);
        command.arg("--control").arg(&self.control);
        command.arg("--state").arg(&self.state);
        Ok(command)
    }

    /// The command line without the lab's own paths, for people.
    pub fn shown(&self) -> String {
        let mut words = vec!["dhcp-reclaim run".to_owned()];
        let mut args = self.args.iter().map(|arg| arg.to_string_lossy());
        while let Some(arg) = args.next() {
            if arg == "--bpffs" {
                args.next();
                continue;
            }
            words.push(arg.into_owned());
        }
        words.join(" ")
    }

    /// Where the agent's output goes.
    pub fn log(&self) -> PathBuf {
        Path::new(DIR).join(format!("{}.log", self.name))
    }

    /// Starts the agent and waits until it answers.
    pub fn start(&self) -> Result<Agent> {
        let mut process = self.spawn()?;
        let dir = self.control.with_file_name("");
        // Its socket may be there before it answers: ready is who has answered once.
        until(
            &dir,
            Duration::from_secs(30),
            "an agent that answers",
            || {
                process.check_alive()?;
                if UnixStream::connect(&self.control).is_err() {
                    return Ok(None);
                }
                Ok(ask(&self.control, &["list", "--json"]).ok())
            },
        )
        .with_context(|| format!("the agent's log ends:\n{}", tail(&process.log(), 15)))?;
        Ok(Agent {
            process,
            control: self.control.clone(),
            events: Events::follow(&self.control)?,
        })
    }

    /// Starts the agent without waiting for anything.
    pub fn spawn(&self) -> Result<Process> {
        Process::spawn(Path::new(DIR), &self.name, &mut self.command()?)
    }
}

impl Agent {
    pub fn list(&self) -> Result<Vec<Binding>> {
        let json = self.ask(&["list", "--json"])?;
        serde_json::from_value(json.clone()).with_context(|| format!("unexpected list: {json}"))
    }

    pub fn binding(&self, ip: Ipv4Addr) -> Result<Option<Binding>> {
        Ok(self.list()?.into_iter().find(|binding| binding.ip == ip))
    }

    /// The state of `ip`'s binding; `none` if there is none.
    pub fn state(&self, ip: Ipv4Addr) -> Result<String> {
        Ok(self
            .binding(ip)?
            .map_or("none".to_owned(), |binding| binding.state))
    }

    pub fn explain(&self, ip: Ipv4Addr) -> Result<Value> {
        self.ask(&["explain", &ip.to_string(), "--json"])
    }

    /// A counter of `stats`; one that was never told is an error, so that a renamed one is seen.
    pub fn stat(&self, name: &str) -> Result<u64> {
        let stats = self.ask(&["stats", "--json"])?;
        let value = stats.get(name).and_then(Value::as_u64);
        value.with_context(|| format!("no counter {name} in {stats}"))
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().clone()
    }

    /// The event after the first `seen` ones.
    pub fn next_event(&self, seen: usize, timeout: Duration) -> Option<Event> {
        let deadline = Deadline::after(timeout);
        let mut events = self.events.lock();
        while events.len() <= seen && !deadline.passed() {
            events = self
                .events
                .shared
                .more
                .wait_timeout(events, deadline.left())
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        events.get(seen).cloned()
    }

    /// Waits for an event, also one of the past.
    pub fn wait_event(&self, name: &str, ip: Ipv4Addr, timeout: Duration) -> Result<Event> {
        self.wait(&format!("event {name} of {ip}"), timeout, |event| {
            event.name == name && event.ip == Some(ip)
        })
    }

    /// Plugs a VM in and starts its client once the agent watches the port: on a loaded machine an
    /// answer could come before that, and would be missed.
    pub fn boot(&self, vm: &mut Vm, client: Client) -> Result<()> {
        vm.plug_in()?;
        self.wait_port_event("port-up", &vm.name, PATIENCE)?;
        vm.start_client(client)
    }

    pub fn wait_port_event(&self, name: &str, port: &str, timeout: Duration) -> Result<Event> {
        self.wait(&format!("event {name} of {port}"), timeout, |event| {
            event.name == name && event.port.as_deref() == Some(port)
        })
    }

    pub fn wait(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let deadline = Deadline::after(timeout);
        let mut events = self.events.lock();
        loop {
            if let Some(event) = events.iter().find(|event| wanted(event)) {
                return Ok(event.clone());
            }
            if deadline.passed() {
                let told: Vec<_> = events.iter().map(|event| event.json.to_string()).collect();
                bail!(
                    "{what}: not within {timeout:?}; events so far:\n{}\nits log:\n{}",
                    told.join("\n"),
                    tail(&self.log(), 15),
                );
            }
            events = self
                .events
                .shared
                .more
                .wait_timeout(events, deadline.left())
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// An error if an event of this name was told about `ip`.
    pub fn ensure_no_event(&self, name: &str, ip: Ipv4Addr) -> Result<()> {
        let events = self.events();
        let told = events
            .iter()
            .find(|event| event.name == name && event.ip == Some(ip));
        ensure!(told.is_none(), "unexpected {told:?}");
        Ok(())
    }

    /// Memory that it has in use, in bytes.
    pub fn rss(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.process.pid());
        let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|text| text.split_whitespace().next());
        Ok(kib.with_context(|| path)?.parse::<u64>()? * 1024)
    }

    /// A counter, also one that was not needed yet.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let stats = self.ask(&["stats", "--json"])?;
        Ok(stats.get(name).and_then(Value::as_u64).unwrap_or(0))
    }

    /// Waits until `look` is content; asked again at each event, and now and then.
    pub fn until<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut look: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Deadline::after(timeout);
        loop {
            let seen = self.events().len();
            if let Some(answer) = look(self)? {
                return Ok(answer);
            }
            if deadline.passed() {
                // The wait for an event that never comes says what was told so far.
                self.wait(what, Duration::ZERO, |_| false)?;
            }
            self.next_event(seen, Duration::from_millis(100));
        }
    }

    /// Waits until nothing about `ip` is in doubt: the gate `confirmed` passes.
    pub fn wait_certain(&self, ip: Ipv4Addr, timeout: Duration) -> Result<()> {
        self.until(&format!("certainty about {ip}"), timeout, |agent| {
            Ok((agent.gate(ip, "confirmed")?.0 == "pass").then_some(()))
        })
    }

    /// What a gate says about `ip` now: its verdict and reason.
    pub fn gate(&self, ip: Ipv4Addr, name: &str) -> Result<(String, String)> {
        let explained = self.explain(ip)?;
        let gates = find(&explained, "gates").and_then(Value::as_array);
        let gates = gates.with_context(|| format!("no gates in {explained}"))?;
        let gate = gates.iter().find(|gate| gate["gate"] == name);
        let gate = gate.with_context(|| format!("no gate {name} in {explained}"))?;
        let text = |field: &str| gate[field].as_str().unwrap_or_default().to_owned();
        Ok((text("verdict"), text("reason")))
    }

    pub fn log(&self) -> String {
        self.process.log()
    }

    pub fn wait_log(&mut self, sign: &str, timeout: Duration) -> Result<()> {
        self.process.wait_log(&[sign], timeout)
    }

    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// What a command answers, for people.
    pub fn ask_text(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary()?);
        run(command.args(args).arg("--control").arg(&self.control))
    }

    /// A command's answer, whatever it is.
    pub fn output(&self, args: &[&str]) -> Result<Answer> {
        let mut command = Command::new(binary()?);
        let output = command.args(args).arg("--control").arg(&self.control);
        Answer::of(output.stdin(Stdio::null()))
    }

    pub fn control(&self) -> &Path {
        &self.control
    }

    /// SIGKILL: what a crash looks like to everybody else.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop(self) -> Result<()> {
        self.stop_within(Duration::from_secs(10))
    }

    /// One that lets go of many ports takes longer.
    pub fn stop_within(mut self, limit: Duration) -> Result<()> {
        let status = self.process.stop(limit)?;
        ensure!(status.success(), "{status}:\n{}", tail(&self.log(), 15));
        Ok(())
    }

    fn ask(&self, args: &[&str]) -> Result<Value> {
        ask(&self.control, args)
    }
}

impl Binding {
    pub fn is_of(&self, mac: Mac) -> bool {
        self.mac.parse::<Mac>().is_ok_and(|this| this == mac)
    }
}

impl Events {
    fn follow(control: &Path) -> Result<Self> {
        let mut follower = Command::new(binary()?)
            .args(["events", "--follow", "--json", "--control"])
            .arg(control)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot follow events")?;
        let stdout = follower.stdout.take().context("no pipe")?;
        let shared = Arc::new(Shared::default());
        std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    shared
                        .events
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(Event::parse(&line));
                    shared.more.notify_all();
                }
            }
        });
        Ok(Self { follower, shared })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.shared
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It ends with the agent too; then there is nothing to kill.
        let _ = self.follower.kill();
        let _ = self.follower.wait();
    }
}

impl Event {
    fn parse(line: &str) -> Self {
        let json: Value = serde_json::from_str(line).unwrap_or_else(|_| line.into());
        let text = |field: &str| json.get(field).and_then(Value::as_str).map(str::to_owned);
        Self {
            at: now(),
            name: text("event").unwrap_or_else(|| format!("not an event: {line}")),
            ip: text("ip").and_then(|ip| ip.parse().ok()),
            port: text("port"),
            json,
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tc => "tc",
            Self::Clsact => "clsact",
            Self::Xdp => "xdp",
        })
    }
}

impl FromStr for Hook {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "tc" => Ok(Self::Tc),
            "clsact" => Ok(Self::Clsact),
            "xdp" => Ok(Self::Xdp),
            other => bail!("{other:?} is none of tc, clsact, xdp"),
        }
    }
}

/// The first value of this name, at whatever depth.
fn find<'a>(json: &'a Value, name: &str) -> Option<&'a Value> {
    match json {
        Value::Object(map) => map
            .get(name)
            .or_else(|| map.values().find_map(|value| find(value, name))),
        Value::Array(list) => list.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

fn ask(control: &Path, args: &[&str]) -> Result<Value> {
    let mut command = Command::new(binary()?);
    let text = run(command.args(args).arg("--control").arg(control))?;
    serde_json::from_str(&text).with_context(|| format!("{args:?} answered {text:?}"))
}

/// The agent's binary: the one that is named by the environment, else the newest build.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os(BIN) {
        return Ok(path.into());
    }
    let me = env::current_exe()?;
    let target = me
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").exists())
        .context("no target directory")?;
    ["debug", "release"]
        .map(|profile| target.join(profile).join("dhcp-reclaim"))
        .into_iter()
        .find(|path| path.exists())
        .ok_or_else(|| {
            anyhow!(
                "no agent below {}: build it, or set {BIN}",
                target.display()
            )
        })
}
