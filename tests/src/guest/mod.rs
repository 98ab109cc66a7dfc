//! A VM for real: a kernel of its own in a qemu of its own, behind a tap of the bridge.
mod image;
mod line;

use std::{
    ffi::OsString,
    fs,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    boot::{Accel, Machine, last_words},
    clock::now,
    fixture::{BRIDGE, Mac},
    netns::NetNs,
    node::Node,
    process::Process,
    sandbox::DIR,
    vm::{Client, Station},
    watch::tail,
};
pub use image::{Image, KERNEL};
use line::{Line, Monitor};

/// From a start to a lease, emulated, while others do the same.
pub const BOOTS: Duration = Duration::from_secs(120);
/// What a running guest does when it is told to.
const OBEYS: Duration = Duration::from_secs(60);
const MEMORY_MIB: u32 = 128;

/// Whose the tap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// qemu makes it, and it goes with qemu.
    OfQemu,
    /// It is there before qemu, and stays without carrier.
    Persistent,
}

/// How a reboot is brought about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reboot {
    FromInside,
    /// The button: QMP `system_reset`.
    Reset,
}

/// What is to run, wherever it does.
#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    pub mac: Mac,
    /// udhcpc or dhclient.
    pub client: Client,
    pub tap: Tap,
    pub accel: Accel,
}

pub struct Guest {
    spec: Spec,
    image: Image,
    qemu: Qemu,
    /// How many qemus it has run in.
    homes: u32,
}

/// One qemu, and the lines to it.
struct Qemu {
    process: Process,
    monitor: Monitor,
    line: Line,
    console: PathBuf,
}

impl Guest {
    /// Starts a guest on `node`. It has a port at once, and a lease once it has booted.
    pub fn boot(node: &Node, image: &Image, spec: Spec) -> Result<Self> {
        let what = format!("cannot start the guest {}", spec.name);
        let qemu = Qemu::start(node, image, &spec, 1, &[]).with_context(|| what)?;
        Ok(Self {
            spec,
            image: image.clone(),
            qemu,
            homes: 1,
        })
    }

    /// Runs a command inside, to its end.
    pub fn run(&self, command: &str) -> Result<()> {
        let from = self.qemu.line.heard();
        self.qemu.line.send(&format!("{from} {command}"))?;
        let status = self.inside(from, command, |line| {
            let (number, status) = line.strip_prefix("done ")?.split_once(' ')?;
            let status = status.parse::<u8>().ok()?;
            (number == from.to_string()).then_some(status)
        })?;
        ensure!(
            status == 0,
            "{}: `{command}` ended {status}",
            self.spec.name
        );
        Ok(())
    }

    /// Asks for more lease time now, instead of at T1.
    pub fn renew(&self) -> Result<()> {
        ensure!(
            self.spec.client == Client::Udhcpc,
            "only udhcpc can be told to"
        );
        let from = self.qemu.line.heard();
        self.run("killall -USR1 udhcpc")?;
        self.inside(from, "a renewal", lease).map(drop)
    }

    /// SIGKILL of its qemu.
    pub fn kill(&mut self) -> Instant {
        let at = now();
        self.qemu.process.kill();
        at
    }

    /// Powers off from inside, without a word to the DHCP server, and waits until its qemu is gone.
    pub fn power_off(&mut self) -> Result<()> {
        let from = self.qemu.monitor.heard();
        self.qemu.line.send("0 poweroff -f")?;
        let of_guest = |data: &Value| data["reason"] == "guest-shutdown";
        self.qemu.event(from, "SHUTDOWN", of_guest)?;
        let status = self.qemu.process.wait_end(OBEYS)?;
        ensure!(status.success(), "qemu ended {status}");
        Ok(())
    }

    /// Starts anew behind the same tap, and returns the address that it is given then.
    pub fn reboot(&self, how: Reboot) -> Result<Ipv4Addr> {
        let said = self.qemu.line.heard();
        let from = self.qemu.monitor.heard();
        let by_guest = match how {
            Reboot::FromInside => {
                self.qemu.line.send("0 reboot -f")?;
                true
            }
            Reboot::Reset => {
                self.qemu.monitor.execute("system_reset", &json!({}))?;
                false
            }
        };
        self.qemu
            .event(from, "RESET", |data| data["guest"] == by_guest)?;
        self.inside_within(said, "a lease after a reboot", BOOTS, lease)
    }

    /// Stops it between two instructions, as a hypervisor pauses a VM.
    pub fn pause(&self) -> Result<()> {
        let from = self.qemu.monitor.heard();
        self.qemu.monitor.execute("stop", &json!({}))?;
        self.qemu.event(from, "STOP", |_| true)
    }

    pub fn go_on(&self) -> Result<()> {
        let from = self.qemu.monitor.heard();
        self.qemu.monitor.execute("cont", &json!({}))?;
        self.qemu.event(from, "RESUME", |_| true)
    }

    /// Moves it, running, into a second qemu on `node`; the first one ends once it is there.
    pub fn migrate(&mut self, node: &Node) -> Result<()> {
        let homes = self.homes + 1;
        let waits = ["-incoming", "defer"].map(OsString::from);
        let target = Qemu::start(node, &self.image, &self.spec, homes, &waits)?;
        let uri = format!("unix:{DIR}/{}-{homes}.migration", self.spec.name);
        let uri = json!({"uri": uri});
        target.monitor.execute("migrate-incoming", &uri)?;
        let arrival = target.monitor.heard();

        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        let monitor = &self.qemu.monitor;
        monitor.execute("migrate-set-capabilities", &events)?;
        let from = monitor.heard();
        monitor.execute("migrate", &uri)?;
        let done = |data: &Value| data["status"] == "completed";
        self.qemu.event(from, "MIGRATION", done)?;
        target.event(arrival, "RESUME", |_| true)?;

        monitor.execute("quit", &json!({}))?;
        let status = self.qemu.process.wait_end(OBEYS)?;
        ensure!(status.success(), "the first qemu ended {status}");
        self.qemu = target;
        self.homes = homes;
        Ok(())
    }

    fn inside<T>(&self, from: usize, what: &str, look: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.inside_within(from, what, OBEYS, look)
    }

    fn inside_within<T>(
        &self,
        from: usize,
        what: &str,
        timeout: Duration,
        look: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let found = self.qemu.line.wait(from, what, timeout, look);
        found.with_context(|| self.qemu.last_words(&self.spec.name))
    }
}

impl Station for Guest {
    fn name(&self) -> &str {
        &self.spec.name
    }

    fn mac(&self) -> Mac {
        self.spec.mac
    }

    fn wait_booted(&self) -> Result<Ipv4Addr> {
        self.inside_within(0, "a lease", BOOTS, lease)
    }

    fn lease(&self) -> Option<Ipv4Addr> {
        self.qemu.line.last(lease)
    }

    fn ping(&self, to: Ipv4Addr) -> Result<()> {
        self.run(&format!("ping -c 1 -W 5 {to}"))
    }

    fn die(&mut self) -> Result<Instant> {
        Ok(self.kill())
    }

    fn by_hand(&self) -> String {
        format!("kill -9 {}", self.qemu.process.pid())
    }

    fn netns(&self) -> Option<&NetNs> {
        None
    }
}

impl Qemu {
    /// Starts a qemu and returns once it takes orders; its guest runs by then, or waits to come in.
    fn start(
        node: &Node,
        image: &Image,
        spec: &Spec,
        home: u32,
        more: &[OsString],
    ) -> Result<Self> {
        let client = match spec.client {
            Client::Udhcpc => "udhcpc",
            Client::Dhclient => "dhclient",
            other => bail!("a guest has no {other:?}"),
        };
        let Spec { name, mac, .. } = spec;
        let dir = Path::new(DIR).join(format!("{name}-{home}"));
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        let [monitor, line] = ["monitor", "line"].map(|socket| dir.join(socket));
        let script = match spec.tap {
            Tap::OfQemu => {
                let script = dir.join("plug");
                fs::write(&script, PLUG.replace("@BRIDGE@", BRIDGE))?;
                fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
                script.display().to_string()
            }
            Tap::Persistent => {
                make_tap(&node.netns, name)?;
                "no".to_owned()
            }
        };
        let machine = Machine {
            kernel: &image.kernel,
            initramfs: Some(&image.initramfs),
            accel: spec.accel,
            cpus: 1,
            memory_mib: MEMORY_MIB,
            console: dir.join("console.log"),
            // A reboot is no end here, so that a panic must be none: such a guest is silent for good.
            append: format!("panic=0 rdinit=/init NAME={name} CLIENT={client}"),
            args: [
                // Both wait for us, so that nothing is said to nobody.
                "-chardev",
                &format!("socket,id=line,path={},server=on,wait=on", line.display()),
                "-serial",
                "chardev:line",
                "-qmp",
                &format!("unix:{},server=on,wait=on", monitor.display()),
                // A guest may start anew.
                "-action",
                "reboot=reset",
                "-netdev",
                &format!("tap,id=net,ifname={name},script={script},downscript=no"),
                "-device",
                &format!("virtio-net-pci,netdev=net,mac={mac},romfile="),
            ]
            .map(OsString::from)
            .into_iter()
            .chain(more.iter().cloned())
            .collect(),
        };
        let told = machine.command();
        let mut command = node.netns.command(told.get_program());
        command.args(told.get_args());
        let mut process = Process::spawn(&dir, "qemu", &mut command)?;
        Ok(Self {
            line: Line::connect("line", &line, &mut process)?,
            monitor: Monitor::connect(&monitor, &mut process)?,
            console: machine.console,
            process,
        })
    }

    fn event(&self, from: usize, event: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        self.monitor.wait_event(from, event, OBEYS, wanted)
    }

    fn last_words(&self, name: &str) -> String {
        // A console that cannot be read has nothing to say.
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        format!(
            "{name}'s console ends:\n{}\nqemu says:\n{}",
            last_words(&console, 20),
            tail(&self.process.log(), 10)
        )
    }
}

/// What both clients' scripts say once there is a lease.
fn lease(line: &str) -> Option<Ipv4Addr> {
    line.strip_prefix("lease ")?.parse().ok()
}

/// qemu runs it with the name of the tap that it made.
const PLUG: &str = r#"#!/bin/sh
exec ip link set "$1" master @BRIDGE@ up
"#;

fn make_tap(netns: &NetNs, name: &str) -> Result<()> {
    netns.ip(&format!(
        "tuntap add dev {name} mode tap
         link set {name} master {BRIDGE} up"
    ))
}
