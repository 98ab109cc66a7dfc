//! The main job, shown: a VM dies, and its address comes back. Runs inside of the sandbox.
use std::{
    collections::BTreeMap,
    fs,
    io::{IsTerminal as _, stdout},
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::{
    agent::{Agent, Event, Setup, binary},
    boot::Accel,
    clock::{Deadline, now},
    fixture::{LEASE_SECONDS, SERVER_IP, vm_mac},
    guest::{Guest, Image, Spec, Tap},
    netns::NetNs,
    sandbox,
    server::{Place, Server},
    vm::{Client, Station},
    watch::tail,
    wire::{Capture, Dhcp, RELEASE},
    world::{PATIENCE, World},
};

use crate::run::{GuestKind, KEPT, LabArgs};

/// The default hold-down with an uplink, and room for a slow machine.
const RECLAIM_PATIENCE: Duration = Duration::from_secs(40);

pub fn main(args: &LabArgs) -> Result<ExitCode> {
    sandbox::enter()?;
    let style = Style {
        colour: stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let guests = match args.guest {
        GuestKind::Veth => None,
        GuestKind::Qemu => Some(Image::new().context("cannot make what guests boot")?),
    };
    let accel = guests.as_ref().map_or(Accel::Tcg, |image| {
        Accel::wanted(args.kvm, &image.kernel, Path::new(sandbox::DIR))
    });
    let lab = Lab {
        world: World::new(args.server, args.place, args.vms)?,
        guests,
        accel,
    };
    let world = &lab.world;
    let setup = world.agent(args.hook);
    let mut vms = Vec::new();
    match demo(args, &lab, &setup, &mut vms, &style) {
        Ok(agent) if args.keep => keep(world, &vms, &agent),
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            println!("\n{} {error:#}", style.red("FAILED:"));
            let agent_log = fs::read_to_string(setup.log()).unwrap_or_default();
            println!("\nthe agent's log ends:\n{}", tail(&agent_log, 20));
            println!(
                "\nthe server's log ends:\n{}",
                tail(&world.server.log(), 20)
            );
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The world, and what its VMs are.
struct Lab {
    world: World,
    /// What real guests boot.
    guests: Option<Image>,
    accel: Accel,
}

impl Lab {
    fn boot(&self, number: u8) -> Result<Box<dyn Station>> {
        let Some(image) = &self.guests else {
            return Ok(Box::new(self.world.boot(number)?));
        };
        let spec = Spec {
            name: format!("vm{number}"),
            mac: vm_mac(number),
            client: match number % 2 {
                0 => Client::Dhclient,
                _ => Client::Udhcpc,
            },
            tap: Tap::OfQemu,
            accel: self.accel,
        };
        Ok(Box::new(Guest::boot(&self.world.node, image, spec)?))
    }
}

fn demo(
    args: &LabArgs,
    lab: &Lab,
    setup: &Setup,
    vms: &mut Vec<Box<dyn Station>>,
    style: &Style,
) -> Result<Agent> {
    let world = &lab.world;
    let server = &world.server;
    println!("\n{}", style.bold("A VM dies, and its address comes back"));
    let place = match args.place {
        Place::Remote => "on another host, behind the bridge's uplink",
        Place::Local => "on this node, at the bridge's own address",
        Place::Libvirt => "on this node, run as libvirt does",
    };
    println!("  server  {} at {SERVER_IP}, {place}", args.server);
    println!("  pool    {} addresses for {} VMs", args.vms, args.vms);
    if let Some(image) = &lab.guests {
        println!("  guests  {image}");
    }
    println!("  agent   {}", setup.shown());
    let agent = setup.start().context("step 1, starting the agent")?;

    for number in 1..=args.vms {
        vms.push(
            lab.boot(number)
                .with_context(|| format!("step 2, booting vm{number}"))?,
        );
    }
    let mut owners = BTreeMap::new();
    for vm in &*vms {
        let ip = vm.wait_booted().context("step 3, leases")?;
        server
            .wait_lease(ip, vm.mac(), PATIENCE)
            .context("step 3, leases")?;
        // A guest that talks: without it an address has never been seen alive.
        vm.ping(SERVER_IP).context("step 3, leases")?;
        owners.insert(ip, vm.name().to_owned());
    }
    print_leases(server, &owners, style)?;
    ensure!(
        server.leases()?.len() == usize::from(args.vms),
        "step 3: the pool is not full"
    );

    let dead = vms.remove(0);
    let ip = dead.lease().context("step 4: the first VM has no lease")?;
    agent
        .wait_event("bound", ip, PATIENCE)
        .or_else(|_| agent.wait_event("requested", ip, PATIENCE))
        .context("step 4, the agent has learned the lease from the wire")?;
    println!(
        "\n{}",
        style.bold(&format!("{} is killed, and its port with it", dead.name()))
    );
    if args.place == Place::Remote {
        println!("  (there is an uplink: the agent first gives the VM time to show up elsewhere)");
    }
    let took = reclaim(world, &agent, dead, ip, style)?;

    let number = args.vms + 1;
    let name = format!("vm{number}");
    println!(
        "\n{}",
        style.bold(&format!("{name} boots, on the pool that was full"))
    );
    let vm = lab.boot(number).context("step 6, the next VM")?;
    let got = vm.wait_booted().context("step 6, the next VM's lease")?;
    server
        .wait_lease(got, vm_mac(number), PATIENCE)
        .context("step 6, the next VM's lease")?;
    ensure!(got == ip, "step 6: {name} got {got}, not the freed {ip}");
    owners.insert(ip, name);
    vms.push(vm);
    print_leases(server, &owners, style)?;
    for vm in &*vms {
        vm.ping(SERVER_IP)
            .context("step 7, the living keep their traffic")?;
    }

    println!(
        "\n{} {ip} was free {:.1} s after the kill; without the agent, {} min later.",
        style.green("ok:"),
        took.as_secs_f64(),
        LEASE_SECONDS / 60,
    );
    Ok(agent)
}

/// Kills `dead` and shows what happens until the server's own store has its address as free.
fn reclaim(
    world: &World,
    agent: &Agent,
    mut dead: Box<dyn Station>,
    ip: Ipv4Addr,
    style: &Style,
) -> Result<Duration> {
    let server = &world.server;
    let wire = Capture::start(server.netns(), server.place.link())?;
    let mut seen = agent.events().len();
    let killed_at = dead.die().context("step 5, the kill")?;
    let name = dead.name().to_owned();
    // With it goes the last hold on its namespace.
    drop(dead);
    let mut timeline = Timeline::new(killed_at);
    timeline.add(killed_at, "killed".to_owned());

    std::thread::scope(|scope| {
        let freed = scope.spawn(|| server.wait_gone(ip, RECLAIM_PATIENCE).map(|()| now()));
        let mut on_wire = false;
        // Once the server has said it, what the agent still has to say is worth a moment.
        let mut last_words = None;
        loop {
            if let Some(event) = agent.next_event(seen, Duration::from_millis(20)) {
                seen += 1;
                if event.ip == Some(ip) || event.port.as_deref() == Some(&name) {
                    timeline.add(event.at, style.dim(&describe(&event)).to_string());
                }
            }
            let frame = wire.frames().into_iter().find(|frame| {
                let ours = |dhcp: &Dhcp| dhcp.kind() == Some(RELEASE) && dhcp.ciaddr == ip;
                frame.dhcp().is_some_and(|dhcp| ours(&dhcp))
            });
            if let (false, Some(frame)) = (on_wire, frame) {
                on_wire = true;
                timeline.add(frame.at, format!("RELEASE of {ip} on the wire"));
            }
            timeline.show(Timeline::SETTLED);
            if freed.is_finished() && last_words.is_none() {
                last_words = Some(Deadline::after(Duration::from_millis(300)));
            }
            let over = agent.events().len() == seen && last_words.is_some_and(Deadline::passed);
            if over {
                break;
            }
        }
        let freed_at = match freed.join() {
            Ok(freed) => freed.context("step 5, the server frees the address")?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let gone = format!("gone from {}'s own lease store", server.kind);
        timeline.add(freed_at, style.green(&gone).to_string());
        timeline.show(Duration::ZERO);
        ensure!(
            on_wire,
            "step 5: the lease went, but no RELEASE was on the wire"
        );
        Ok(freed_at - killed_at)
    })
}

/// Rows from several watchers, each a little late, in the order in which things happened.
struct Timeline {
    start: Instant,
    rows: Vec<(Instant, String)>,
}

impl Timeline {
    /// Nobody comes with a row older than this.
    const SETTLED: Duration = Duration::from_millis(100);

    fn new(start: Instant) -> Self {
        Self {
            start,
            rows: Vec::new(),
        }
    }

    fn add(&mut self, at: Instant, text: String) {
        self.rows.push((at, text));
    }

    /// Shows the rows that are older than `age`.
    fn show(&mut self, age: Duration) {
        self.rows.sort_by_key(|(at, _)| *at);
        let settled = self.rows.partition_point(|(at, _)| *at + age <= now());
        for (at, text) in self.rows.drain(..settled) {
            let after = at.saturating_duration_since(self.start).as_secs_f64();
            println!("  t+{after:7.3} s  {text}");
        }
    }
}

fn describe(event: &Event) -> String {
    let reason = event.json.get("reason").and_then(|reason| reason.as_str());
    let reason = reason.filter(|reason| !reason.is_empty());
    let name = event.name.replace('-', " ");
    reason.map_or(format!("agent: {name}"), |reason| {
        format!("agent: {name} ({reason})")
    })
}

fn print_leases(server: &Server, owners: &BTreeMap<Ipv4Addr, String>, style: &Style) -> Result<()> {
    println!(
        "\n{}",
        style.bold(&format!("leases, as {} has them", server.kind))
    );
    for lease in server.leases()? {
        let owner = owners.get(&lease.ip).map_or("?", String::as_str);
        println!("  {:<12}  {}  {owner}", lease.ip, lease.mac);
    }
    Ok(())
}

/// Lets go of whoever started us, and stays until somebody kills this process.
fn keep(world: &World, vms: &[Box<dyn Station>], agent: &Agent) -> Result<ExitCode> {
    let node = NetNs::current()?;
    let mut nets = BTreeMap::from([
        ("node".to_owned(), node.fd()),
        ("server".to_owned(), world.server.netns().fd()),
    ]);
    for vm in vms {
        nets.extend(vm.netns().map(|netns| (vm.name().to_owned(), netns.fd())));
    }

    let agent_bin = binary()?;
    let ask = format!("cargo xtask lab-shell -- {}", agent_bin.display());
    let control = agent.control().display();
    println!("\nThe lab stays up. Inside of it:");
    for command in ["list", "events --follow", "stats"] {
        println!("  {ask} {command} --control {control}");
    }
    let places: Vec<_> = nets.keys().map(String::as_str).collect();
    println!(
        "  cargo xtask lab-shell PLACE                    a shell; places: {}",
        places.join(", ")
    );
    if let Some(vm) = vms.last() {
        let kill = format!("cargo xtask lab-shell node -- {}", vm.by_hand());
        println!("  {kill:<46} kill {}", vm.name());
    }
    println!("  cargo xtask lab-shell node -- ls /run/lab      logs, leases, configurations");
    println!("  cargo xtask lab-down                           take it down");

    // Whoever reads our output must not wait for the lab's end.
    let null = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    sandbox::outlive_parent()?;
    nix::unistd::dup2_stdin(null.as_fd())?;
    nix::unistd::dup2_stdout(null.as_fd())?;
    nix::unistd::dup2_stderr(null.as_fd())?;
    fs::write(KEPT, serde_json::to_vec(&nets)?)?;
    loop {
        std::thread::park();
    }
}

struct Style {
    colour: bool,
}

impl Style {
    fn paint(&self, code: &str, text: &str) -> String {
        match self.colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn green(&self, text: &str) -> String {
        self.paint("32", text)
    }

    fn red(&self, text: &str) -> String {
        self.paint("31", text)
    }
}
