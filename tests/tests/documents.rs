//! Every command of README.md and docs/*.md is run, in the order of its document, in a lab: a bridge
//! `br0` with a DHCP server behind it, a VM that lives and one that died. What this machine cannot do
//! (a hypervisor's own tools, installing packages) is stood in for by [`STUBS`]; a command that is
//! neither there nor in [`REAL`] fails.
use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dhcp_reclaim_tests::{
    agent::binary,
    fixture::SERVER_IP,
    lab_test,
    process::Process,
    sandbox::{DIR, find, run},
    server::{Place, ServerKind},
    tmux::Terminal,
    vm::{KillKind, Vm},
    watch::{tail, until},
    world::{PATIENCE, World},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// What is run as it stands.
const REAL: &[&str] = &[
    "curl",
    "dhcp-reclaim",
    "df",
    "ip",
    "jq",
    "ls",
    "rm",
    "sed",
    "tail",
];

/// What stands in for a program that is not here, or must not run.
struct Stub {
    program: &'static str,
    reason: &'static str,
    /// The arguments that it knows, as patterns of the shell's `case`; anything else fails.
    accepts: &'static [&'static str],
}

const STUBS: &[Stub] = &[
    Stub {
        program: "apt",
        reason: "the package is installed by its own test; here the binary is in the PATH",
        accepts: &[
            "install ./dhcp-reclaim_*_amd64.deb",
            "remove dhcp-reclaim",
            "purge dhcp-reclaim",
        ],
    },
    Stub {
        program: "cargo",
        reason: "these build and run all of this, and this test is a part of it",
        accepts: &[
            "build --release",
            "xtask run",
            "xtask test",
            "xtask dist",
            "xtask dist --test",
            "xtask vm",
        ],
    },
    Stub {
        program: "virsh",
        reason: "no libvirt here",
        accepts: &["net-list --all", "net-dumpxml default"],
    },
    Stub {
        program: "bridge",
        reason: "no bridge of this name here",
        accepts: &["vlan add vid 100 dev vmbr0 self"],
    },
    Stub {
        program: "tcpdump",
        reason: "it ends when its reader has seen enough",
        accepts: &["-eni eth0 udp port 67"],
    },
    Stub {
        program: "qm",
        reason: "no Proxmox VE here",
        accepts: &["list", "config 100"],
    },
    Stub {
        program: "incus",
        reason: "no Incus here",
        accepts: &["network list", "network show incusbr0"],
    },
    Stub {
        program: "kubectl",
        reason: "no cluster here",
        accepts: &[
            "apply -f packaging/kubernetes/dhcp-reclaim.yaml",
            "-n dhcp-reclaim rollout status daemonset/dhcp-reclaim",
            "-n dhcp-reclaim exec daemonset/dhcp-reclaim -- dhcp-reclaim list",
            "-n dhcp-reclaim edit configmap dhcp-reclaim",
            "-n dhcp-reclaim rollout restart daemonset/dhcp-reclaim",
            "delete -f packaging/kubernetes/dhcp-reclaim.yaml",
            "get network-attachment-definitions --all-namespaces",
            "get virtualmachineinstances --all-namespaces",
        ],
    },
];

/// Where the unit of the package looks for its settings.
const CONFIG: &str = "/etc/dhcp-reclaim/dhcp-reclaim.toml";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A command as it is written, and what is shown as its answer.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    line: usize,
    text: String,
    answer: Vec<String>,
}

/// The commands of all blocks that are marked as a shell's.
fn commands_of(document: &str) -> Vec<Shown> {
    let mut shown: Vec<Shown> = Vec::new();
    let (mut language, mut continued) = (None, false);
    for (number, line) in document.lines().enumerate() {
        if let Some(fence) = line.strip_prefix("```") {
            language = match language {
                None => Some(fence.trim()),
                Some(_) => None,
            };
            continued = false;
            continue;
        }
        let text = match language {
            Some("sh") if !line.trim().is_empty() => line,
            // A user's prompt, or root's.
            Some("console") => match line.strip_prefix("$ ").or(line.strip_prefix("# ")) {
                Some(text) => text,
                None if continued => line,
                None if line.is_empty() => continue,
                None => {
                    if let Some(last) = shown.last_mut() {
                        last.answer.push(line.to_owned());
                    }
                    continue;
                }
            },
            _ => continue,
        };
        if continued && let Some(last) = shown.last_mut() {
            last.text.push_str(text.trim_start());
        } else {
            shown.push(Shown {
                line: number + 1,
                text: text.to_owned(),
                answer: Vec::new(),
            });
        }
        let last = shown.last_mut().map(|shown| &mut shown.text);
        continued = last.is_some_and(|text| match text.strip_suffix('\\') {
            None => false,
            Some(head) => {
                *text = head.to_owned();
                true
            }
        });
    }
    for command in &mut shown {
        command.text = without_comment(&command.text).to_owned();
    }
    shown.retain(|command| !command.text.is_empty());
    shown
}

/// A `#` after two blanks begins a comment for the reader.
fn without_comment(text: &str) -> &str {
    let end = match text.starts_with('#') {
        true => 0,
        false => text.find("  #").unwrap_or(text.len()),
    };
    text[..end].trim_end()
}

/// The programs that a command line starts. Quotes may hide none of the separators.
fn programs(text: &str) -> Vec<&str> {
    let parts = text.split("&&").flat_map(|part| part.split(['|', ';']));
    parts
        .filter_map(|part| {
            let mut words = part.split_whitespace();
            words.find(|word| !word.contains('='))
        })
        .collect()
}

struct Session {
    _world: World,
    dead: Ipv4Addr,
    alive: Ipv4Addr,
    _vm: Vm,
    agent: Option<Process>,
    path: String,
    terminals: u32,
}

impl Session {
    fn new() -> Result<Self> {
        // A host of the reader's own, for what the commands write.
        for dir in ["/etc", "/var/lib"] {
            let upper = Path::new(DIR).join("host").join(dir.replace('/', "-"));
            let work = upper.with_extension("work");
            fs::create_dir_all(&upper)?;
            fs::create_dir_all(&work)?;
            let options = format!(
                "lowerdir={dir},upperdir={},workdir={}",
                upper.display(),
                work.display()
            );
            run(Command::new("/bin/mount").args(["-t", "overlay", "overlay", "-o", &options, dir]))?;
        }
        let bin = Path::new(DIR).join("stubs");
        fs::create_dir_all(&bin)?;
        symlink(binary()?, bin.join("dhcp-reclaim"))?;
        for stub in STUBS {
            let known: Vec<_> = stub
                .accepts
                .iter()
                .map(|args| args.replace(' ', "\\ "))
                .collect();
            let script = format!(
                "#!/bin/sh\n# {}\ncase \"$*\" in\n{}) ;;\n*) echo \"{} does not know: $*\" >&2; exit 1 ;;\nesac\n",
                stub.reason,
                known.join(" | "),
                stub.program
            );
            let path = bin.join(stub.program);
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let ip = find("ip").context("no ip")?;
        let path = format!(
            "{}:{}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin",
            bin.display(),
            ip.with_file_name("").display()
        );
        fs::write(Path::new(DIR).join("dhcp-reclaim_0.1.0_amd64.deb"), "")?;
        // What the package would bring.
        fs::create_dir_all(Path::new(CONFIG).with_file_name(""))?;
        fs::copy(root().join("packaging/config/dhcp-reclaim.toml"), CONFIG)?;

        lease_files()?;

        let world = World::new(ServerKind::Dnsmasq, Place::Local, 4)?;
        world.node.netns.ip("link add virbr0 type bridge
             addr add 192.168.122.1/24 dev virbr0
             link set virbr0 up")?;
        let mut session = Self {
            dead: Ipv4Addr::UNSPECIFIED,
            alive: Ipv4Addr::UNSPECIFIED,
            _vm: Vm::off(&world.node, "vm2", dhcp_reclaim_tests::fixture::vm_mac(2))?,
            _world: world,
            agent: None,
            path,
            terminals: 0,
        };
        // One that knows both: what it learned is there for all that follow.
        session.start("dhcp-reclaim run --bridge br0 --dry-run")?;
        let mut dead = session._world.boot(1)?;
        session.dead = dead.wait_lease(PATIENCE)?;
        session
            ._vm
            .start_client(dhcp_reclaim_tests::vm::Client::Udhcpc)?;
        session._vm.plug_in()?;
        session.alive = session._vm.wait_lease(PATIENCE)?;
        session._vm.ping(SERVER_IP)?;
        let both = [session.dead, session.alive].map(|ip| ip.to_string());
        session.until_listed(&both)?;
        dead.kill(KillKind::PortDeleted)?;
        session.stop(Signal::SIGTERM)?;
        Ok(session)
    }

    /// As a reader would see it, with the addresses of this lab for those of the text.
    fn here(&self, text: &str) -> String {
        text.replace("10.0.0.11", &self.alive.to_string())
            .replace("10.0.0.10", &self.dead.to_string())
    }

    fn shell(&self, text: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-ec", text])
            .current_dir(DIR)
            .env("PATH", &self.path);
        command
    }

    fn until_listed(&self, parts: &[String]) -> Result<()> {
        until(
            Path::new(DIR),
            PATIENCE,
            &format!("{parts:?} in the list"),
            || {
                // It may not answer yet.
                let list = run(&mut self.shell("dhcp-reclaim list --json")).unwrap_or_default();
                Ok(parts.iter().all(|part| list.contains(part)).then_some(()))
            },
        )
    }

    /// Starts an agent, in the place of the one that runs, and waits until it answers.
    fn start(&mut self, text: &str) -> Result<()> {
        self.stop(Signal::SIGTERM)?;
        let mut agent = Process::spawn(
            Path::new(DIR),
            "documented",
            &mut self.shell(&format!("exec {text}")),
        )?;
        until(Path::new(DIR), PATIENCE, "an agent that answers", || {
            agent.check_alive()?;
            Ok(run(&mut self.shell("dhcp-reclaim stats --json")).ok())
        })
        .with_context(|| tail(&agent.log(), 15))?;
        self.agent = Some(agent);
        Ok(())
    }

    fn stop(&mut self, signal: Signal) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.signal(signal)?;
            let end = agent.wait_end(PATIENCE)?;
            ensure!(end.success(), "{end}: {}", tail(&agent.log(), 15));
        }
        Ok(())
    }

    /// The agent that a command takes for granted, on the bridge that it speaks of.
    fn need_agent(&mut self, text: &str) -> Result<()> {
        let bridge = if text.contains("virbr0") {
            "virbr0"
        } else {
            "br0"
        };
        if let Some(agent) = &mut self.agent {
            agent.check_alive()?;
            let stats = run(&mut self.shell("dhcp-reclaim stats --json"))?;
            let stats: Value = serde_json::from_str(&stats)?;
            let bridges = stats["bridges"].as_array().context("no bridges")?;
            if bridges.iter().any(|name| name == bridge) {
                return Ok(());
            }
        }
        self.start(&format!("dhcp-reclaim run --bridge {bridge} --dry-run"))
    }

    /// systemd, as far as the documents use it: a service that runs the agent with its file.
    fn systemctl(&mut self, args: &[&str]) -> Result<()> {
        let [verb, options @ .., "dhcp-reclaim"] = args else {
            bail!("a unit that is not known: systemctl {args:?}");
        };
        match (*verb, options) {
            ("enable", ["--now"]) | ("start" | "restart", []) => {
                let unit =
                    fs::read_to_string(root().join("packaging/systemd/dhcp-reclaim.service"))?;
                let line = unit
                    .lines()
                    .find_map(|line| line.strip_prefix("ExecStart=/usr/bin/"));
                self.start(line.context("the unit starts nothing")?)
            }
            ("disable", ["--now"]) | ("stop", []) => self.stop(Signal::SIGTERM),
            ("status", []) => self.agent.as_mut().context("no agent")?.check_alive(),
            ("reload", []) => {
                let agent = self.agent.as_mut().context("no agent to reload")?;
                agent.signal(Signal::SIGHUP)?;
                agent.wait_log(&["configuration read again, and followed"], PATIENCE)
            }
            other => bail!("systemctl does not know {other:?}"),
        }
    }

    fn follow_a_while(&mut self, text: &str) -> Result<()> {
        let mut follower = Process::spawn(
            Path::new(DIR),
            "follower",
            &mut self.shell(&format!("exec {text}")),
        )?;
        let known = self.dead.to_string();
        follower.wait_log(&[&known, "port-up"], PATIENCE)?;
        follower.stop(PATIENCE).map(drop)
    }

    fn top(&mut self) -> Result<()> {
        self.terminals += 1;
        let terminal = Terminal::open(&format!("top{}", self.terminals), 80, 24)?;
        terminal.line(&format!("clear; {} top", binary()?.display()))?;
        terminal.wait_text(&["q quit", &self.alive.to_string()])?;
        terminal.text("q")?;
        terminal.wait_end(0).map(drop)
    }

    fn run(&mut self, shown: &Shown) -> Result<()> {
        let text = self.here(&shown.text);
        let words: Vec<_> = text.split_whitespace().collect();
        for program in programs(&text) {
            let known = REAL.contains(&program)
                || program == "systemctl"
                || STUBS.iter().any(|stub| stub.program == program);
            ensure!(known, "{program} is not known to this test");
        }
        match words.as_slice() {
            ["systemctl", args @ ..] => return self.systemctl(args),
            ["dhcp-reclaim", "run", rest @ ..] if !rest.contains(&"--check") => {
                return self.start(&text);
            }
            _ => {}
        }
        for file in words.iter().filter(|word| word.starts_with("packaging/")) {
            ensure!(root().join(file).exists(), "there is no {file}");
        }
        match words.as_slice() {
            // They need none.
            ["dhcp-reclaim", "detach" | "doctor" | "run", ..] => {}
            ["dhcp-reclaim", ..] => self.need_agent(&text)?,
            _ => {}
        }
        match words.as_slice() {
            ["dhcp-reclaim", "top"] => return self.top(),
            ["dhcp-reclaim", _, rest @ ..]
                if rest.contains(&"--follow") || rest.contains(&"--watch") =>
            {
                return self.follow_a_while(&text);
            }
            _ => {}
        }
        let answer = match words.as_slice() {
            ["dhcp-reclaim", "probe" | "release", ..] => {
                // 4 is an answer, too: the VM is silent, or a gate holds.
                let output = self.shell(&text).output()?;
                let code = output.status.code();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(matches!(code, Some(0 | 4)), "{}: {said}", output.status);
                String::from_utf8_lossy(&output.stdout).into_owned()
            }
            _ => run(&mut self.shell(&text))?,
        };
        // A table's head is a contract with whoever reads it; its rows are this lab's.
        if let Some(head) = shown.answer.first().filter(|line| is_head(line)) {
            let words = |line: &str| {
                line.split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            let first = answer.lines().next().unwrap_or_default();
            ensure!(
                words(first) == words(head),
                "it says {first:?}, the document {head:?}"
            );
        }
        Ok(())
    }
}

/// Lease files of servers, where a host has them.
fn lease_files() -> Result<()> {
    for (path, contents) in [
        (
            "/var/lib/misc/dnsmasq.leases",
            "2000000000 02:00:00:00:00:21 10.67.0.121 vm21 *\n",
        ),
        (
            "/var/lib/kea/kea-leases4.csv",
            "address,hwaddr,client_id,valid_lifetime,expire,subnet_id,fqdn_fwd,fqdn_rev,hostname,\
             state,user_context,pool_id\n\
             10.67.0.122,02:00:00:00:00:22,,3600,2000000000,1,0,0,vm22,0,,0\n",
        ),
        (
            "/var/lib/libvirt/dnsmasq/virbr0.status",
            "[{\"ip-address\": \"192.168.122.23\", \"mac-address\": \"02:00:00:00:00:23\", \
             \"hostname\": \"vm23\", \"expiry-time\": 2000000000}]\n",
        ),
    ] {
        let path = Path::new(path);
        fs::create_dir_all(path.with_file_name(""))?;
        fs::write(path, contents).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// A table's: words in capitals.
fn is_head(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words.all(|word| word.chars().all(|c| c.is_ascii_uppercase()))
}

/// Documents with nothing to type in them.
const NO_COMMANDS: [&str; 6] = [
    "docs/benchmarks.md",
    "docs/commands.md",
    "docs/comparison.md",
    "docs/configuration.md",
    "docs/safety.md",
    "docs/security.md",
];

fn document_is_true(name: &str) -> Result<()> {
    let text = fs::read_to_string(root().join(name)).with_context(|| name.to_owned())?;
    let commands = commands_of(&text);
    ensure!(
        commands.is_empty() == NO_COMMANDS.contains(&name),
        "{name} has {} commands",
        commands.len()
    );
    if commands.is_empty() {
        return Ok(());
    }
    let mut session = Session::new()?;
    for command in &commands {
        session
            .run(command)
            .with_context(|| format!("{name}:{}: {}", command.line, command.text))?;
    }
    println!("NOTE {name}: {} commands", commands.len());
    session.stop(Signal::SIGTERM)
}

macro_rules! documents {
    ($($test:ident: $name:literal;)+) => {
        lab_test! {
            within Duration::from_secs(300);
            $(fn $test() { document_is_true($name) })+
        }

        #[test]
        fn every_document_has_its_test() {
            let tested = BTreeSet::from([$($name.to_owned()),+]);
            let mut there = BTreeSet::from(["README.md".to_owned()]);
            for entry in fs::read_dir(root().join("docs")).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                there.insert(format!("docs/{name}"));
            }
            assert_eq!(tested, there);
        }
    };
}

documents! {
    readme: "README.md";
    benchmarks: "docs/benchmarks.md";
    commands: "docs/commands.md";
    comparison: "docs/comparison.md";
    configuration: "docs/configuration.md";
    getting_started: "docs/getting-started.md";
    observation: "docs/observation.md";
    operations: "docs/operations.md";
    safety: "docs/safety.md";
    security: "docs/security.md";
    upgrade_and_removal: "docs/upgrade-and-removal.md";
}

lab_test! {
    fn every_counter_of_the_agent_is_described() {
        let mut session = Session::new()?;
        session.need_agent("")?;
        let stats: Value = serde_json::from_str(&run(&mut session.shell("dhcp-reclaim stats --json"))?)?;
        let operations = fs::read_to_string(root().join("docs/operations.md"))?;
        let counters: BTreeSet<_> = stats.as_object().context("no object")?.keys().filter(|name| name.contains('.')).collect();
        ensure!(counters.len() > 50, "{stats}");
        let missing: Vec<_> = counters.iter().filter(|name| !operations.contains(&format!("`{name}`"))).collect();
        ensure!(missing.is_empty(), "docs/operations.md does not describe {missing:?}");
        let (_, section) = operations.split_once("\n## Counters\n").context("no section")?;
        let described = section.split('`').filter(|name| name.starts_with("agent."));
        let gone: Vec<_> = described.filter(|name| !counters.iter().any(|counter| counter == name)).collect();
        ensure!(gone.is_empty(), "docs/operations.md describes {gone:?}, which is not counted");
        Ok(())
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut links = 0;
    let mut documents: Vec<_> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    documents.extend(["README.md", "ARCHITECTURE.md"].map(|name| root().join(name)));
    for path in documents {
        let text = fs::read_to_string(&path).unwrap();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.with_file_name(file),
            };
            let there = fs::read_to_string(&target)
                .unwrap_or_else(|_| panic!("{}: {link} leads nowhere", path.display()));
            let anchors = there
                .lines()
                .filter(|line| line.starts_with('#'))
                .map(|line| {
                    let name = line.trim_start_matches('#').trim().to_lowercase();
                    name.replace(' ', "-").replace([',', '`', '.', ':'], "")
                });
            assert!(
                anchor.is_empty() || anchors.clone().any(|name| name == anchor),
                "{}: nothing is called {link}",
                path.display()
            );
        }
    }
    assert!(links > 5, "{links} links found");
}

#[test]
fn commands_are_found_as_they_are_written() {
    let text = "```console\n$ a b   # why\nHEAD X\nrow\n$ c \\\n  d\n```\n```text\n$ e\n```\n```sh\nf  # g\n\n# h\n```\n";
    let found: Vec<_> = commands_of(text)
        .into_iter()
        .map(|shown| (shown.text, shown.answer))
        .collect();
    assert_eq!(
        found,
        [
            (
                "a b".to_owned(),
                vec!["HEAD X".to_owned(), "row".to_owned()]
            ),
            ("c d".to_owned(), Vec::new()),
            ("f".to_owned(), Vec::new()),
        ]
    );
    assert_eq!(programs("A=1 x y && z | w; v"), ["x", "z", "w", "v"]);
}
