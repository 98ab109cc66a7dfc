//! The agent as a service: what its manager hears, what a reload changes, and what it gives up.
use std::{
    env, fs, io,
    net::TcpStream,
    os::unix::{
        net::UnixDatagram,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, exit},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dhcp_reclaim_agent::{
    core::{Port, Role},
    kernel::{self, Kernel, LoadOptions},
    sandbox::{self, KEPT, Paths, Strictness},
};
use dhcp_reclaim_tests::{
    agent::{Agent, Hook, STATE, binary},
    boot::kernel::{running, unlimit_locked_memory},
    fixture::SERVER_IP,
    lab_test,
    sandbox::{BPFFS, DIR, find, run},
    server::{Place, ServerKind},
    vm::KillKind,
    world::{PATIENCE, World},
};
use nix::{
    net::if_::{if_indextoname, if_nametoindex},
    sched::{CloneFlags, unshare},
    sys::{
        ptrace,
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, socket},
    },
    unistd::Pid,
};

/// Stands in for the service manager.
struct Manager(UnixDatagram);

const SOCKET: &str = "/run/lab/notify";

impl Manager {
    fn listen() -> Result<Self> {
        let socket = UnixDatagram::bind(SOCKET)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// The next message that is no pat for the watchdog.
    fn hear(&self) -> Result<String> {
        loop {
            let told = self.hear_any()?;
            if told != "WATCHDOG=1" {
                return Ok(told);
            }
        }
    }

    fn hear_any(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = self.0.recv(&mut buffer).context("nothing is told")?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Leaves no room for another message before some are read.
    fn fill(&self) -> Result<()> {
        loop {
            // A socket for each: what fills is the manager's queue, and not what one of us may send.
            let other = UnixDatagram::unbound()?;
            other.set_nonblocking(true)?;
            match other.send_to(b"WATCHDOG=1", SOCKET) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends SIGHUP, and returns what the agent says once it has read its file again.
    fn reload(&self, agent: &Agent) -> Result<String> {
        kill(agent.pid(), Signal::SIGHUP)?;
        let told = self.hear()?;
        let micros = told.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
        let micros = micros.with_context(|| format!("not a reload: {told}"))?;
        ensure!(micros.parse::<u64>()? > 0, "{told}");
        let told = self.hear()?;
        let status = told.strip_prefix("READY=1\nSTATUS=");
        Ok(status
            .with_context(|| format!("not ready again: {told}"))?
            .to_owned())
    }
}

/// What /proc says of the process: one line's value.
fn status(pid: Pid, name: &str) -> Result<String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path)?;
    let mut lines = text.lines().filter_map(|line| line.split_once(":\t"));
    let value = lines.find_map(|(key, value)| (key == name).then(|| value.trim().to_owned()));
    value.with_context(|| format!("no {name} in {path}"))
}

fn unit_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("packaging/systemd/dhcp-reclaim.service")
}

fn unit() -> Result<String> {
    let path = unit_path();
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// systemd's own opinion, from 0 to 100.
#[test]
fn the_unit_exposes_less_than_25() {
    let Some(analyze) = find("systemd-analyze") else {
        println!("SKIP the_unit_exposes_less_than_25: there is no systemd-analyze");
        return;
    };
    let told = |threshold: u8| {
        let mut command = Command::new(&analyze);
        command.args(["security", "--offline=true"]);
        command.arg(format!("--threshold={threshold}"));
        run(command.arg(unit_path()))
    };
    told(24).unwrap();
    // It does judge: nothing that has the host's network is this safe.
    assert!(told(5).is_err());
}

lab_test! {
    fn the_manager_hears_of_each_step_and_a_reload_is_followed() {
        let manager = Manager::listen()?;
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 3)?;
        let config = Path::new(DIR).join("etc/agent.toml");
        fs::create_dir_all(config.with_file_name(""))?;
        // As an editor does it.
        let write = |text: &str| -> Result<()> {
            let fresh = config.with_extension("new");
            fs::write(&fresh, text)?;
            Ok(fs::rename(&fresh, &config)?)
        };
        write("dry-run = true\n")?;
        let path = config.to_string_lossy().into_owned();
        let agent = world
            .agent(Hook::Tc)
            .quick()
            .args(&["--config", &path])
            .env("NOTIFY_SOCKET", SOCKET)
            .env("WATCHDOG_USEC", "600000")
            .start()?;
        let told = manager.hear()?;
        ensure!(told.starts_with("READY=1\nSTATUS="), "{told}");
        for _ in 0..3 {
            let told = manager.hear_any()?;
            ensure!(told == "WATCHDOG=1", "{told}");
        }

        let (mut vm, ip) = world.living(&agent, 1)?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_event("would-release", ip, PATIENCE)?;
        ensure!(world.server.has(ip)?, "a dry run released {ip}");

        write("dry-run = false\nrate = 0\n")?;
        let refused = manager.reload(&agent)?;
        let place = format!("refused: {path}:2: `rate`: zero");
        ensure!(refused.contains(&place), "{refused}");
        write("dry-run = false\nhook = \"xdp\"\nstate = \"/elsewhere\"\n")?;
        let refused = manager.reload(&agent)?;
        // The state's folder is a flag here, and flags win.
        ensure!(refused.contains("refused: hook: cannot change"), "{refused}");
        fs::remove_file(&config)?;
        let refused = manager.reload(&agent)?;
        ensure!(refused.contains("refused: cannot read"), "{refused}");
        ensure!(agent.stat("agent.reloads_refused")? == 3);

        // The old one stays: still nothing is sent.
        let (mut vm, ip) = world.living(&agent, 2)?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_event("would-release", ip, PATIENCE)?;
        ensure!(world.server.has(ip)?, "a dry run released {ip}");

        write("dry-run = false\nrecord-rate = 33\n")?;
        let status = manager.reload(&agent)?;
        ensure!(!status.contains("refused"), "{status}");
        ensure!(agent.stat("agent.reloads")? == 1);
        let (mut vm, ip) = world.living(&agent, 3)?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_event("released", ip, PATIENCE)?;
        world.server.wait_gone(ip, PATIENCE)?;

        // A manager that reads late: what it is to know waits for it, in its order.
        let reloads = agent.stat("agent.reloads")?;
        manager.fill()?;
        kill(agent.pid(), Signal::SIGHUP)?;
        agent.until("a reload that nobody hears of", PATIENCE, |agent| {
            Ok((agent.stat("agent.reloads")? > reloads).then_some(()))
        })?;
        let told = manager.hear()?;
        ensure!(told.starts_with("RELOADING=1\n"), "{told}");
        let told = manager.hear()?;
        ensure!(told.starts_with("READY=1\nSTATUS="), "{told}");

        manager.fill()?;
        kill(agent.pid(), Signal::SIGTERM)?;
        let told = manager.hear()?;
        ensure!(told == "STOPPING=1", "{told}");
        agent.stop()
    }

    fn the_capabilities_of_the_unit_suffice() {
        let unit = unit()?;
        let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let named: Vec<String> = line
            .context("the unit bounds no capabilities")?
            .split(' ')
            .map(|name| name.trim_start_matches("CAP_").to_lowercase())
            .collect();
        ensure!(named.len() == 5, "{named:?}");
        // The unit's LimitMEMLOCK=.
        unlimit_locked_memory()?;
        let world = World::new(ServerKind::Dnsmasq, Place::Local, 2)?;
        let agent = world.agent(Hook::Tc).quick().capabilities(&named).start()?;
        let bounding = u64::from_str_radix(&status(agent.pid(), "CapBnd")?, 16)?;
        ensure!(bounding.count_ones() == 5, "{bounding:x}");
        let (mut vm, ip) = world.living(&agent, 1)?;
        vm.kill(KillKind::PortDeleted)?;
        agent.wait_event("released", ip, PATIENCE)?;
        world.server.wait_gone(ip, PATIENCE)?;
        agent.stop()
    }

    fn a_running_agent_has_given_up_what_it_does_not_need() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let kept = KEPT.iter().fold(0, |mask, kept| mask | kept.bitmask());
        let agent = world.agent(Hook::Tc).quick().start()?;
        for (name, expected) in [
            ("CapInh", 0),
            ("CapPrm", kept),
            ("CapEff", kept),
            ("CapBnd", kept),
            ("CapAmb", 0),
        ] {
            let mask = u64::from_str_radix(&status(agent.pid(), name)?, 16)?;
            ensure!(mask == expected, "{name}: {mask:x} and not {expected:x}");
        }
        for (name, expected) in [("NoNewPrivs", "1"), ("Seccomp", "2"), ("Threads", "1")] {
            let value = status(agent.pid(), name)?;
            ensure!(value == expected, "{name}: {value}");
        }
        agent.stop()?;

        let agent = world.agent(Hook::Tc).quick().args(&["--sandbox", "off"]).start()?;
        let off = status(agent.pid(), "Seccomp")?;
        ensure!(off == "0", "Seccomp: {off}");
        agent.stop()
    }

    fn what_a_stopped_agent_left_can_be_taken_away() {
        let world = World::new(ServerKind::Dnsmasq, Place::Remote, 1)?;
        let agent = world.agent(Hook::Tc).quick().start()?;
        let (_vm, _) = world.living(&agent, 1)?;
        let detach = || -> Result<(bool, String)> {
            let mut command = Command::new(binary()?);
            let output = command.args(["detach", "--bpffs", BPFFS]).output()?;
            let told = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Ok((output.status.success(), told))
        };
        let pins = Path::new(BPFFS).join("dhcp-reclaim");
        let running = detach()?;
        ensure!(!running.0 && running.1.contains("another agent"), "{running:?}");
        agent.stop()?;
        ensure!(pins.exists(), "nothing was left");
        let done = detach()?;
        // The VM's port, and the uplink.
        ensure!(done == (true, "detached from 2 ports".to_owned()), "{done:?}");
        ensure!(!pins.exists(), "pins are left");
        let again = detach()?;
        ensure!(again == (true, "nothing was left".to_owned()), "{again:?}");
        Ok(())
    }

    fn what_the_sandbox_refuses() {
        fs::create_dir_all(STATE)?;
        for link in ["tcx", "clsact", "xdp"] {
            run(Command::new("ip").args(["link", "add", "name", link, "type", "veth"]))?;
        }
        let landlock = running()? >= (5, 13);
        let refused = |status: ExitStatus| match landlock {
            true => status.code() == Some(REFUSED),
            false => status.success(),
        };
        let killed = |status: ExitStatus| status.signal() == Some(libc_sigsys());
        for (name, expected) in [
            ("own-state", ExitStatus::success as fn(&ExitStatus) -> bool),
            ("interface-name", ExitStatus::success),
            ("tcx", ExitStatus::success),
            ("clsact", ExitStatus::success),
            ("xdp", ExitStatus::success),
        ] {
            let status = attempt(name)?;
            ensure!(expected(&status), "{name}: {status}");
        }
        for name in ["system-file", "foreign-file", "list-etc"] {
            let status = attempt(name)?;
            ensure!(refused(status), "{name}: {status}");
        }
        for name in [
            "exec",
            "spawn",
            "thread",
            "tcp",
            "packet-socket",
            "trace",
            "namespace",
            "kill",
        ] {
            let status = attempt(name)?;
            ensure!(killed(status), "{name}: {status}");
        }
        Ok(())
    }
}

fn libc_sigsys() -> i32 {
    Signal::SIGSYS as i32
}

const ATTEMPT: &str = "DHCP_RECLAIM_ATTEMPT";
const REFUSED: i32 = 13;

/// Has a process of its own enter the sandbox and try it.
fn attempt(name: &str) -> Result<ExitStatus> {
    Command::new(env::current_exe()?)
        .args(["in_the_sandbox", "--exact", "--ignored", "--nocapture"])
        .env(ATTEMPT, name)
        .env("RUST_BACKTRACE", "0")
        .status()
        .context("cannot run this test again")
}

#[test]
#[ignore = "what_the_sandbox_refuses runs it, once for each attempt"]
fn in_the_sandbox() {
    let name = env::var(ATTEMPT).expect("an attempt");
    let paths = Paths {
        config: None,
        state: vec![STATE.into()],
        control: Path::new(DIR).join("control.sock"),
        bpffs: BPFFS.into(),
        unpin: false,
    };
    let hook = match name.as_str() {
        "tcx" => Some(kernel::Hook::Tc),
        "clsact" => Some(kernel::Hook::Clsact),
        "xdp" => Some(kernel::Hook::Xdp),
        _ => None,
    };
    let kernel = hook.map(|hook| {
        Kernel::load(&LoadOptions {
            bpffs: BPFFS.into(),
            hook,
            ..LoadOptions::default()
        })
        .expect("the kernel half")
    });
    sandbox::enter(Strictness::Enforce, &paths).expect("a sandbox");
    let done = match kernel {
        Some(mut kernel) => late_port(&mut kernel, &name),
        None => tried(&name),
    };
    match done {
        Ok(()) => exit(0),
        Err(error) => {
            let refused = error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
            eprintln!("{name}: {error:#}");
            exit(if refused { REFUSED } else { 1 });
        }
    }
}

/// A port that comes after the sandbox, and goes.
fn late_port(kernel: &mut Kernel, name: &str) -> Result<()> {
    let ifindex = if_nametoindex(name)?;
    let port = Port {
        ifindex,
        name: name.to_owned(),
        segment: 1,
        role: Role::Vm,
    };
    for _ in 0..2 {
        kernel.watch(&port, 15, 60)?;
    }
    kernel.counters()?;
    kernel.unwatch(ifindex);
    Ok(())
}

fn tried(name: &str) -> Result<()> {
    match name {
        "own-state" => {
            let file = Path::new(STATE).join("file");
            fs::write(&file, "x")?;
            fs::rename(&file, file.with_extension("old"))?;
            fs::remove_file(file.with_extension("old"))?;
        }
        "interface-name" => drop(if_indextoname(1)?),
        "system-file" => drop(fs::read("/etc/passwd")?),
        "foreign-file" => fs::write(Path::new(DIR).join("foreign"), "x")?,
        "list-etc" => drop(fs::read_dir("/etc")?),
        "exec" => return Err(Command::new("/bin/true").exec().into()),
        "spawn" => drop(Command::new("/bin/true").status()?),
        "thread" => drop(thread::Builder::new().spawn(|| {})?.join()),
        "tcp" => {
            let address = (SERVER_IP, 80).into();
            drop(TcpStream::connect_timeout(
                &address,
                Duration::from_millis(1),
            )?);
        }
        "packet-socket" => drop(socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::empty(),
            None,
        )?),
        "trace" => ptrace::attach(Pid::parent())?,
        "namespace" => unshare(CloneFlags::CLONE_NEWUSER)?,
        "kill" => kill(Pid::parent(), None)?,
        other => bail!("no attempt {other}"),
    }
    Ok(())
}
