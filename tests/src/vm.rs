//! A VM as the node sees it: a bridge port, and behind it a kernel that takes a lease.
use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::{
    boot::kernel::running,
    clock::{now, slowness},
    fixture::{BRIDGE, Mac, NIC, PREFIX},
    netns::NetNs,
    node::{Node, cable_end, tag},
    process::Process,
    sandbox::{DIR, foreign, run, skip},
    watch::{tail, until},
    world::PATIENCE,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    Udhcpc,
    /// `udhcpc -a`: looks by ARP whether somebody has the address, and declines it then.
    UdhcpcChecking,
    Dhclient,
    Dhcpcd,
    Networkd,
}

/// What lives behind a port, as far as its neighbours and whoever waits for its lease are concerned.
pub trait Station {
    fn name(&self) -> &str;
    fn mac(&self) -> Mac;
    /// Waits until it has booted and been given an address.
    fn wait_booted(&self) -> Result<Ipv4Addr>;
    /// The address that it was given last.
    fn lease(&self) -> Option<Ipv4Addr>;
    fn ping(&self, to: Ipv4Addr) -> Result<()>;
    /// Ends it without a word to anybody, and its port with it; returns when that happened.
    fn die(&mut self) -> Result<Instant>;
    /// The same by hand: a command on its node.
    fn by_hand(&self) -> String;
    /// The namespace that it is, if it is one.
    fn netns(&self) -> Option<&NetNs>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillKind {
    /// The hypervisor process dies and its tap with it.
    PortDeleted,
    /// Its tap leaves the bridge before, as Proxmox and Incus have it.
    PortDetached,
    /// It dies and leaves a persistent tap without carrier.
    CarrierLost,
    /// The guest's kernel is dead; the hypervisor does not know.
    PortKept,
}

/// Option 61, as the client is to send it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientId {
    /// Whatever it sends by itself.
    Default,
    None,
    /// Its type is the first byte.
    Given(Vec<u8>),
}

const ARP_IGNORE: &str = "/proc/sys/net/ipv4/conf/all/arp_ignore";
/// No request is answered (ip-sysctl.rst).
const ARP_SILENT: &str = "8";

/// What a migration does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    OldPortFirst,
    NewPortFirst,
}

pub struct Vm {
    /// For clients that are started from now on.
    pub client_id: ClientId,
    pub name: String,
    pub mac: Mac,
    /// When its link came into being, before its client could start.
    pub linked_at: Instant,
    node: NetNs,
    /// The VLAN that it puts its frames into.
    vlan: Option<u16>,
    netns: NetNs,
    dir: PathBuf,
    life: u64,
    client: Option<(Client, Process)>,
    traffic: Vec<Traffic>,
}

/// Guests so far.
static LIVES: AtomicU64 = AtomicU64::new(0);

impl Vm {
    /// Makes the port `name` and boots a VM behind it, whose client asks as soon as it has a link.
    pub fn boot(node: &Node, name: &str, mac: Mac, client: Client) -> Result<Self> {
        let mut vm = Self::off(node, name, mac)?;
        vm.start_client(client)?;
        vm.plug_in()?;
        Ok(vm)
    }

    /// A VM without a port and without a client.
    pub fn off(node: &Node, name: &str, mac: Mac) -> Result<Self> {
        let dir = Path::new(DIR).join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        Ok(Self {
            client_id: ClientId::Default,
            name: name.to_owned(),
            mac,
            linked_at: now(),
            node: node.netns.try_clone()?,
            vlan: node.vlan,
            netns: NetNs::new()?,
            dir,
            life: LIVES.fetch_add(1, Ordering::Relaxed),
            client: None,
            traffic: Vec::new(),
        })
    }

    /// Makes the VM's port and puts it on the bridge. One batch, so that nothing comes between.
    pub fn plug_in(&mut self) -> Result<()> {
        let Self { name, mac, .. } = self;
        let end = cable_end(self.vlan);
        let batch = self.dir.join("plug");
        fs::write(
            &batch,
            format!(
                "link add {name} type veth peer name {end} address {mac} netns {}
                 link set {name} master {BRIDGE} up\n",
                self.netns.path(),
            ),
        )?;
        self.linked_at = now();
        run(self.node.command(foreign("ip")?).arg("-batch").arg(&batch))?;
        tag(&self.netns, self.vlan)?;
        // A client that waits for its link has brought it up by now, or does so later.
        self.netns.ip(&format!("link set {NIC} up"))
    }

    /// Waits until the bridge of the sandbox's own node hands frames on to the port: that comes up to
    /// a second after the link. A client asks again; a frame by hand is lost.
    pub fn wait_forwarding(&self, timeout: Duration) -> Result<()> {
        let state = format!("/sys/class/net/{}/brport/state", self.name);
        until(&self.dir, timeout, "a port that forwards", || {
            Ok((fs::read_to_string(&state)?.trim() == "3").then_some(()))
        })
    }

    pub fn start_client(&mut self, client: Client) -> Result<()> {
        let process = Process::spawn(&self.dir, "client", &mut self.client_command(client)?)?;
        self.client = Some((client, process));
        Ok(())
    }

    /// Ends its client without a word, and starts another: what a reboot does, with the port kept.
    pub fn restart_client(&mut self, client: Client) -> Result<()> {
        if let Some((_, mut process)) = self.client.take() {
            process.kill();
        }
        self.netns.ip(&format!(
            "addr flush dev {NIC}
             link set {NIC} arp on"
        ))?;
        self.start_client(client)
    }

    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// The address that the client has been given.
    pub fn wait_lease(&self, timeout: Duration) -> Result<Ipv4Addr> {
        until(
            &self.dir,
            timeout,
            &format!("a lease for {}", self.name),
            || Ok(self.lease()),
        )
        .with_context(|| format!("its client says:\n{}", tail(&self.client_log(), 15)))
    }

    /// Of this guest alone: the script of a client that was killed may write down its last lease when
    /// another guest of that name lives.
    fn lease_file(&self) -> PathBuf {
        self.dir.join(format!("lease-{}", self.life))
    }

    pub fn lease(&self) -> Option<Ipv4Addr> {
        let text = fs::read_to_string(self.lease_file()).ok()?;
        let line = text
            .split_inclusive('\n')
            .rfind(|line| line.ends_with('\n'))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    pub fn client_log(&self) -> String {
        self.client
            .as_ref()
            .map(|(_, process)| process.log())
            .unwrap_or_default()
    }

    /// Has the client give its lease back, as a guest does when it shuts down.
    pub fn release(&mut self) -> Result<()> {
        let Some((client, process)) = &mut self.client else {
            return Ok(());
        };
        match client {
            Client::Udhcpc | Client::UdhcpcChecking => process.signal(Signal::SIGUSR2),
            Client::Dhcpcd => process.signal(Signal::SIGALRM),
            Client::Networkd => bail!("systemd-networkd gives nothing back when asked to"),
            Client::Dhclient => {
                process.kill();
                let mut command = dhclient(&self.netns, &self.dir, &self.client_id)?;
                run(command.args(["-r", NIC])).map(drop)
            }
        }
    }

    /// Asks for more lease time now, instead of at T1. Only udhcpc can be asked to.
    pub fn renew(&self) -> Result<()> {
        let (_, process) = self.client.as_ref().context("no client")?;
        process.signal(Signal::SIGUSR1)
    }

    pub fn ping(&self, to: Ipv4Addr) -> Result<()> {
        if self.netns.shell(&format!("cat {ARP_IGNORE}"))?.trim() == ARP_SILENT {
            // Whom it asks learns its MAC by that, since it would not answer.
            self.netns.ip(&format!("neigh flush dev {NIC}"))?;
        }
        let mut command = self.netns.command(foreign("busybox")?);
        let to = to.to_string();
        let patience = (2 * slowness()).to_string();
        run(command.args(["ping", "-c", "1", "-W", &patience, &to]))
            .map(drop)
            .with_context(|| format!("{} cannot reach {to}", self.name))
    }

    /// Sends a datagram to `to` every `period`, until the VM is killed, frozen or dropped.
    pub fn send_traffic(&mut self, to: Ipv4Addr, period: Duration) -> Result<()> {
        let socket = self.netns.enter(|| Ok(UdpSocket::bind("0.0.0.0:9")?))?;
        self.traffic.push(Traffic::start(socket, to, period));
        Ok(())
    }

    /// How many datagrams have been sent.
    pub fn traffic_sent(&self) -> u64 {
        self.traffic
            .iter()
            .map(|traffic| traffic.sent.load(Ordering::Relaxed))
            .sum()
    }

    /// From now on no ARP request is answered, while everything else goes on.
    pub fn silence_arp(&self) -> Result<()> {
        self.netns
            .shell(&format!("echo {ARP_SILENT} >{ARP_IGNORE}"))
            .map(drop)
    }

    /// Stops the VM between two instructions: it sends nothing, and its link stays up.
    pub fn freeze(&mut self) -> Result<()> {
        self.traffic.clear();
        if let Some((_, process)) = &self.client {
            process.signal(Signal::SIGSTOP)?;
        }
        self.netns
            .shell("echo 1 >/proc/sys/net/ipv4/icmp_echo_ignore_all")?;
        self.netns.ip(&format!("link set {NIC} arp off"))
    }

    pub fn thaw(&mut self) -> Result<()> {
        self.netns.ip(&format!("link set {NIC} arp on"))?;
        self.netns
            .shell("echo 0 >/proc/sys/net/ipv4/icmp_echo_ignore_all")?;
        if let Some((_, process)) = &self.client {
            process.signal(Signal::SIGCONT)?;
        }
        Ok(())
    }

    /// Ends the VM without a word to anybody, and returns when it happened.
    pub fn kill(&mut self, kind: KillKind) -> Result<Instant> {
        let at = now();
        self.traffic.clear();
        if let Some((_, mut process)) = self.client.take() {
            process.kill();
        }
        match kind {
            KillKind::PortDeleted => self.unplug()?,
            KillKind::PortDetached => {
                self.node.ip(&format!("link set {} nomaster", self.name))?;
                self.unplug()?;
            }
            KillKind::CarrierLost => self.netns.ip(&format!("link set {NIC} down"))?,
            KillKind::PortKept => {
                self.netns.ip(&format!(
                    "link set {NIC} arp off
                     addr flush dev {NIC}"
                ))?;
            }
        }
        Ok(at)
    }

    /// Takes the port away and leaves the guest running without a link.
    pub fn unplug(&self) -> Result<()> {
        self.node.ip(&format!("link del {}", self.name))
    }

    /// Moves the running guest to another node: its memory and MAC stay, its port is another one.
    pub fn migrate(&mut self, to: &Node, ip: Ipv4Addr, order: Order) -> Result<()> {
        if order == Order::NewPortFirst && running()? < (6, 2) {
            return skip("Linux renames a link that is up from 6.2 on, and a guest keeps its name");
        }
        let from = std::mem::replace(&mut self.node, to.netns.try_clone()?);
        if order == Order::OldPortFirst {
            from.ip(&format!("link del {}", self.name))?;
        } else {
            self.netns.ip(&format!(
                "addr flush dev {NIC}
                 link set {NIC} name old0
                 link set old0 arp off"
            ))?;
        }
        self.plug_in()?;
        self.configure(ip)?;
        if order == Order::NewPortFirst {
            from.ip(&format!("link del {}", self.name))?;
        }
        Ok(())
    }

    /// Gives the guest its address back after [`Vm::plug_in`]: its client still holds the lease.
    pub fn configure(&self, ip: Ipv4Addr) -> Result<()> {
        self.netns
            .ip(&format!("addr replace {ip}/{PREFIX} dev {NIC}"))
    }

    fn client_command(&self, client: Client) -> Result<std::process::Command> {
        let lease = self.lease_file();
        let script = self.dir.join("script");
        let text = match client {
            Client::Udhcpc | Client::UdhcpcChecking => UDHCPC_SCRIPT,
            Client::Dhclient => DHCLIENT_SCRIPT,
            Client::Dhcpcd => DHCPCD_SCRIPT,
            Client::Networkd => NETWORKD_SCRIPT,
        };
        fs::write(
            &script,
            text.replace("@LEASE@", &lease.display().to_string()),
        )?;
        run(std::process::Command::new("chmod").arg("755").arg(&script))?;
        let mut command = match client {
            Client::Udhcpc | Client::UdhcpcChecking => {
                // busybox's own wait for a link is a second long.
                let mut command = self.netns.command("/bin/sh");
                command.args(["-c", WHEN_LINKED, "sh"]);
                command.arg(foreign("udhcpc")?);
                command.args(["-f", "-i", NIC, "-t", "20", "-T", "1", "-A", "1"]);
                command.args(["-x", &format!("hostname:{}", self.name), "-s"]);
                command.arg(&script);
                match &self.client_id {
                    ClientId::Default => {}
                    ClientId::None => {
                        command.arg("-C");
                    }
                    ClientId::Given(id) => {
                        command.arg("-C");
                        command.arg("-x").arg(format!("0x3d:{}", hex(id, "")));
                    }
                }
                if client == Client::UdhcpcChecking {
                    command.arg("-a200");
                }
                command
            }
            Client::Dhclient => {
                let mut command = self.netns.command("/bin/sh");
                let dhclient = dhclient(&self.netns, &self.dir, &self.client_id)?;
                command.args(["-c", WHEN_LINKED, "sh"]);
                command
                    .arg(dhclient.get_program())
                    .args(dhclient.get_args());
                command.args(["-d", NIC]);
                command
            }
            Client::Dhcpcd => {
                let mut command = self.netns.command("/usr/bin/unshare");
                command.args(["--mount", "/bin/sh", "-c", DHCPCD_HOME, "sh"]);
                command.args(["/bin/sh", "-c", WHEN_LINKED, "sh"]);
                command.arg(foreign("dhcpcd")?);
                command.args(["-B", "-4", "-A", "--noipv6rs", "-f", "/dev/null", "-c"]);
                command.arg(&script);
                match &self.client_id {
                    // Its own default depends on its configuration file, which is empty here.
                    ClientId::Default => {
                        command.args(["-I", ""]);
                    }
                    ClientId::None => {}
                    ClientId::Given(id) => {
                        command.arg("-I").arg(hex(id, ":"));
                    }
                }
                command.arg(NIC);
                command
            }
            // Below.
            Client::Networkd => self.netns.command("/bin/false"),
        };
        if client == Client::Networkd {
            let daemon = Path::new("/usr/lib/systemd/systemd-networkd");
            ensure!(daemon.exists(), "{} is not installed", daemon.display());
            let network = self.dir.join("10-vm.network");
            fs::write(&network, NETWORKD_NETWORK)?;
            command = self.netns.command("/usr/bin/unshare");
            command
                .arg("--mount")
                .arg(&script)
                .args([network.as_path(), daemon]);
        }
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        Ok(command)
    }
}

impl Station for Vm {
    fn name(&self) -> &str {
        &self.name
    }

    fn mac(&self) -> Mac {
        self.mac
    }

    fn wait_booted(&self) -> Result<Ipv4Addr> {
        self.wait_lease(PATIENCE)
    }

    fn lease(&self) -> Option<Ipv4Addr> {
        Self::lease(self)
    }

    fn ping(&self, to: Ipv4Addr) -> Result<()> {
        Self::ping(self, to)
    }

    fn die(&mut self) -> Result<Instant> {
        self.kill(KillKind::PortDeleted)
    }

    fn by_hand(&self) -> String {
        format!("ip link del {}", self.name)
    }

    fn netns(&self) -> Option<&NetNs> {
        Some(&self.netns)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Processes first: without the last one the namespace goes, and the link with it.
        self.traffic.clear();
        self.client = None;
    }
}

fn hex(bytes: &[u8], separator: &str) -> String {
    let digits: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(separator)
}

fn dhclient(netns: &NetNs, dir: &Path, id: &ClientId) -> Result<std::process::Command> {
    let config = dir.join("dhclient.conf");
    let mut text = "timeout 10; retry 1; initial-interval 1;\n".to_owned();
    if let ClientId::Given(id) = id {
        writeln!(text, "send dhcp-client-identifier {};", hex(id, ":"))?;
    }
    fs::write(&config, text)?;
    let mut command = netns.command(foreign("dhclient")?);
    command.args(["-4", "-v", "-cf"]).arg(&config);
    command.arg("-sf").arg(dir.join("script"));
    command.arg("-lf").arg(dir.join("dhclient.leases"));
    command.arg("-pf").arg(dir.join("dhclient.pid"));
    Ok(command)
}

/// Runs its arguments as soon as the link is there, as a guest that boots does.
const WHEN_LINKED: &str = r#"
until ip link set eth0 up 2>/dev/null; do :; done
exec "$@"
"#;

const UDHCPC_SCRIPT: &str = r#"#!/bin/sh
case "$1" in
deconfig)
    ip addr flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    ip addr replace "$ip/$mask" dev "$interface"
    echo "$1 $ip" >>@LEASE@
    ;;
esac
"#;

const DHCLIENT_SCRIPT: &str = r#"#!/bin/sh
case "$reason" in
PREINIT) ip link set "$interface" up ;;
BOUND | RENEW | REBIND | REBOOT)
    ip addr replace "$new_ip_address/24" dev "$interface"
    echo "$reason $new_ip_address" >>@LEASE@
    ;;
EXPIRE | FAIL | RELEASE | STOP) ip addr flush dev "$interface" ;;
esac
"#;

const DHCPCD_SCRIPT: &str = r#"#!/bin/sh
case "$reason" in
BOUND | RENEW | REBIND | REBOOT) echo "$reason $new_ip_address" >>@LEASE@ ;;
esac
"#;

/// dhcpcd knows one place for its files; each VM gets its own.
const DHCPCD_HOME: &str = r#"
for dir in /var/lib/dhcpcd /run/dhcpcd; do
    mkdir -p "$dir"
    mount -t tmpfs none "$dir"
done
exec "$@"
"#;

/// It keeps its files in one place too, and without a writable `/sys` waits for no udev.
const NETWORKD_SCRIPT: &str = r#"#!/bin/sh
set -e
mkdir -p /run/systemd
mount -t tmpfs none /run/systemd
mkdir -p /run/systemd/network /run/systemd/netif/leases /run/systemd/netif/links
mount -t sysfs -o ro none /sys
cp "$1" /run/systemd/network/
chown -R systemd-network /run/systemd/netif
ip -o -4 monitor address | while read -r _ name family address _; do
    if [ "$name" = eth0 ] && [ "$family" = inet ]; then
        echo "bound ${address%/*}" >>@LEASE@
    fi
done &
exec "$2"
"#;

const NETWORKD_NETWORK: &str = "\
[Match]
Name=eth0

[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no

[DHCPv4]
SendRelease=no
";

/// Datagrams at a steady pace.
struct Traffic {
    sent: Arc<AtomicU64>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Traffic {
    fn start(socket: UdpSocket, to: Ipv4Addr, period: Duration) -> Self {
        let sent = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn({
            let sent = Arc::clone(&sent);
            move || {
                while stopped.recv_timeout(period) == Err(mpsc::RecvTimeoutError::Timeout) {
                    if socket.send_to(b"busy", (to, 9)).is_ok() {
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        Self {
            sent,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It ends with its channel; one that panicked has ended already.
            let _ = thread.join();
        }
    }
}
