//! DHCP servers, and what *they* have in their own stores: the judge of every test.
use std::{
    collections::BTreeMap,
    fmt, fs,
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    libc::{ENOENT, ESRCH},
    sys::signal::Signal,
};
use serde_json::json;

use crate::{
    clock::wall,
    fixture::{
        BRIDGE, LEASE_SECONDS, Mac, NIC, PREFIX, SERVER_IP, SERVER_MAC, UPLINK, UPLINK_MAC, pool_ip,
    },
    netns::NetNs,
    node::{Node, cable_end, tag},
    process::Process,
    sandbox::{DIR, foreign},
    watch::{tail, until},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerKind {
    Dnsmasq,
    Kea,
    Isc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a namespace of its own, behind the bridge's uplink.
    Remote,
    /// On this node, at the bridge's own address.
    Local,
    /// There too, and run as libvirt runs it for its networks: dnsmasq, in libvirt's own way.
    Libvirt,
}

impl Place {
    /// What the server listens at, in its namespace.
    pub fn link(self) -> &'static str {
        match self {
            Self::Remote => NIC,
            Self::Local | Self::Libvirt => BRIDGE,
        }
    }
}

/// An active lease, as the server's store has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lease {
    pub ip: Ipv4Addr,
    pub mac: Mac,
}

/// What a server may give away, and how it is to behave.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    pub first: Ipv4Addr,
    pub last: Ipv4Addr,
    pub prefix: u8,
    /// Whether it answers lease queries (RFC 4388): ISC dhcpd only.
    pub leasequery: bool,
    /// T1 in seconds (option 58), instead of the server's own.
    pub renewal: Option<u32>,
}

impl Pool {
    /// A few addresses of the lab's own network.
    pub fn small(count: u8) -> Self {
        Self {
            first: pool_ip(0),
            last: pool_ip(count.saturating_sub(1)),
            prefix: PREFIX,
            leasequery: false,
            renewal: None,
        }
    }

    /// More than a thousand addresses.
    pub fn large() -> Self {
        Self {
            first: Ipv4Addr::new(10, 67, 4, 0),
            last: Ipv4Addr::new(10, 67, 9, 255),
            prefix: 16,
            leasequery: false,
            renewal: None,
        }
    }

    fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - self.prefix))
    }

    fn subnet(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() & self.netmask().to_bits())
    }
}

pub struct Server {
    pub kind: ServerKind,
    pub place: Place,
    netns: NetNs,
    process: Process,
    store: PathBuf,
}

impl Server {
    /// Starts a server for a pool of exactly `pool` addresses, and waits until it serves.
    pub fn start(node: &Node, kind: ServerKind, place: Place, pool: u8) -> Result<Self> {
        Self::start_with(node, kind, place, Pool::small(pool), &[])
    }

    /// The same with any pool, and more arguments for its command line; those of dnsmasq may name
    /// the pool in its stead.
    pub fn start_with(
        node: &Node,
        kind: ServerKind,
        place: Place,
        pool: Pool,
        args: &[&str],
    ) -> Result<Self> {
        let prefix = pool.prefix;
        let (netns, link) = match place {
            Place::Remote => (behind_uplink(node, prefix)?, NIC.to_owned()),
            Place::Local | Place::Libvirt => {
                let mut link = BRIDGE.to_owned();
                if let Some(vlan) = node.vlan {
                    link = format!("{BRIDGE}.{vlan}");
                    node.netns.ip(&format!(
                        "link add link {BRIDGE} name {link} type vlan id {vlan}
                         link set {link} up"
                    ))?;
                }
                // Kea opens no socket on a bridge without carrier, so one port is always there.
                node.netns.ip(&format!(
                    "addr add {SERVER_IP}/{prefix} dev {link}
                     link add idle0 type veth peer name idle1
                     link set idle0 master {BRIDGE}
                     link set idle0 up
                     link set idle1 up"
                ))?;
                (NetNs::current()?, link)
            }
        };
        let link = link.as_str();
        let dir = Path::new(DIR).join("server");
        let (store, process) = launch(kind, place, &dir, &netns, link, &pool, args)?;
        Ok(Self {
            kind,
            place,
            netns,
            process,
            store,
        })
    }

    /// Ends it, and starts in its place one at another address that knows of no lease: dnsmasq, for a
    /// server elsewhere. It is the judge from then on.
    pub fn succeed(&mut self, ip: Ipv4Addr, pool: Pool, args: &[&str]) -> Result<()> {
        self.process.kill();
        self.netns.ip(&format!(
            "addr flush dev {NIC}
             addr add {ip}/{} dev {NIC}",
            pool.prefix,
        ))?;
        self.kind = ServerKind::Dnsmasq;
        let dir = Path::new(DIR).join("successor");
        (self.store, self.process) =
            launch(self.kind, self.place, &dir, &self.netns, NIC, &pool, args)?;
        Ok(())
    }

    /// The namespace that the server listens in.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// The file with its leases, in its own format.
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// The leases that the server's store has as active, sorted by address.
    pub fn leases(&self) -> Result<Vec<Lease>> {
        self.parse(&self.settled_store()?)
    }

    /// The same, while the store may be written: a lease that is there may be missing.
    pub fn glance(&self) -> Result<Vec<Lease>> {
        let text = fs::read_to_string(&self.store)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.parse(&text[..whole])
    }

    fn parse(&self, text: &str) -> Result<Vec<Lease>> {
        let now = wall().as_secs();
        let mut leases = match self.kind {
            ServerKind::Dnsmasq => dnsmasq_leases(text, now),
            ServerKind::Kea => kea_leases(text, now),
            ServerKind::Isc => isc_leases(text),
        }
        .with_context(|| format!("cannot read {}:\n{text}", self.store.display()))?;
        leases.sort();
        Ok(leases)
    }

    pub fn has(&self, ip: Ipv4Addr) -> Result<bool> {
        Ok(self.leases()?.iter().any(|lease| lease.ip == ip))
    }

    /// Waits until the store has `ip` as `mac`'s.
    pub fn wait_lease(&self, ip: Ipv4Addr, mac: Mac, timeout: Duration) -> Result<()> {
        self.wait(
            &format!("the server's lease of {ip} to {mac}"),
            timeout,
            |leases| leases.contains(&Lease { ip, mac }),
        )
    }

    /// Waits until the store no longer has `ip` as anybody's.
    pub fn wait_gone(&self, ip: Ipv4Addr, timeout: Duration) -> Result<()> {
        self.wait(
            &format!("the end of the server's lease of {ip}"),
            timeout,
            |leases| leases.iter().all(|lease| lease.ip != ip),
        )
    }

    fn wait(
        &self,
        what: &str,
        timeout: Duration,
        mut look: impl FnMut(&[Lease]) -> bool,
    ) -> Result<()> {
        until(&self.store.with_file_name(""), timeout, what, || {
            Ok(look(&self.leases()?).then_some(()))
        })
        .with_context(|| format!("the server's log ends:\n{}", tail(&self.log(), 15)))
    }

    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Stops the server between two instructions.
    pub fn freeze(&self) -> Result<()> {
        self.process.signal(Signal::SIGSTOP)
    }

    pub fn thaw(&self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)
    }

    /// Kea and dhcpd append to their stores; dnsmasq truncates its file and writes it anew, so a
    /// reader can meet it half written, and must not take that for a lease's end.
    fn settled_store(&self) -> Result<String> {
        let dir = self.store.with_file_name("");
        until(&dir, Duration::from_secs(5), "a quiet lease store", || {
            let before = (stamp(&self.store)?, self.rest()?);
            if self.kind == ServerKind::Dnsmasq && before.1.is_none() {
                return Ok(None);
            }
            let text = fs::read_to_string(&self.store)?;
            Ok(((stamp(&self.store)?, self.rest()?) == before).then_some(text))
        })
    }

    /// How often the server has gone to sleep, if it sleeps: it writes between two waits, so that what
    /// is read within one of them is whole, however slow the machine is. A server that has ended rests.
    fn rest(&self) -> Result<Option<u64>> {
        match fs::read_to_string(format!("/proc/{}/status", self.process.pid())) {
            Ok(status) => Ok(sleeps(&status)),
            Err(error) if [ENOENT, ESRCH].map(Some).contains(&error.raw_os_error()) => Ok(Some(0)),
            Err(error) => Err(error).context("the server's /proc/PID/status"),
        }
    }
}

/// Of proc_pid_status(5): how often, if that process sleeps, or has been stopped or has ended.
fn sleeps(status: &str) -> Option<u64> {
    let value = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    };
    let rests = value("State").is_some_and(|state| state.starts_with(['S', 'T', 't', 'Z', 'X']));
    let times = value("voluntary_ctxt_switches").and_then(|times| times.parse().ok());
    // One that has ended is told without.
    rests.then(|| times.unwrap_or(0))
}

impl fmt::Display for ServerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dnsmasq => "dnsmasq",
            Self::Kea => "Kea",
            Self::Isc => "ISC dhcpd",
        })
    }
}

impl FromStr for ServerKind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "dnsmasq" => Ok(Self::Dnsmasq),
            "kea" => Ok(Self::Kea),
            "isc" => Ok(Self::Isc),
            other => bail!("{other:?} is none of dnsmasq, kea, isc"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Remote => "remote",
            Self::Local => "local",
            Self::Libvirt => "libvirt",
        })
    }
}

impl FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "remote" => Ok(Self::Remote),
            "local" => Ok(Self::Local),
            "libvirt" => Ok(Self::Libvirt),
            other => bail!("{other:?} is none of remote, local, libvirt"),
        }
    }
}

fn behind_uplink(node: &Node, prefix: u8) -> Result<NetNs> {
    let netns = NetNs::new()?;
    let end = cable_end(node.vlan);
    node.netns.ip(&format!(
        "link add {UPLINK} address {UPLINK_MAC} type veth peer name {end} address {SERVER_MAC} netns {}
         link set {UPLINK} master {BRIDGE}
         link set {UPLINK} up",
        netns.path(),
    ))?;
    tag(&netns, node.vlan)?;
    netns.ip(&format!(
        "addr add {SERVER_IP}/{prefix} dev {NIC}
         link set {NIC} up"
    ))?;
    Ok(netns)
}

/// Starts a server and waits until it serves.
fn launch(
    kind: ServerKind,
    place: Place,
    dir: &Path,
    netns: &NetNs,
    link: &str,
    pool: &Pool,
    args: &[&str],
) -> Result<(PathBuf, Process)> {
    fs::create_dir_all(dir)?;
    let (store, mut process) = match kind {
        ServerKind::Dnsmasq if place == Place::Libvirt => libvirt(dir, netns, link, pool, args)?,
        _ if place == Place::Libvirt => bail!("libvirt runs dnsmasq, not {kind}"),
        ServerKind::Dnsmasq => dnsmasq(dir, netns, link, pool, args)?,
        ServerKind::Kea => kea(dir, netns, link, pool)?,
        ServerKind::Isc => isc(dir, netns, link, pool)?,
    };
    let ready: &[&str] = match kind {
        ServerKind::Dnsmasq => &["DHCP, sockets bound"],
        ServerKind::Kea => &["DHCP4_STARTED"],
        ServerKind::Isc => &["Server starting service."],
    };
    process.wait_log(ready, Duration::from_secs(15))?;
    Ok((store, process))
}

fn dnsmasq(
    dir: &Path,
    netns: &NetNs,
    link: &str,
    pool: &Pool,
    args: &[&str],
) -> Result<(PathBuf, Process)> {
    let store = dir.join("dnsmasq.leases");
    fs::write(&store, "")?;
    let mut command = netns.command(foreign("dnsmasq")?);
    command.args([
        "--no-daemon",
        "--conf-file=/dev/null",
        "--user=root",
        "--port=0",
        "--bind-interfaces",
        "--except-interface=lo",
        // Its ping before an OFFER takes three seconds.
        "--no-ping",
        "--log-dhcp",
        "--dhcp-sequential-ip",
        "--dhcp-lease-max=2000",
        "--pid-file=",
    ]);
    command.args([
        format!("--interface={link}"),
        format!("--dhcp-leasefile={}", store.display()),
    ]);
    let named = args.iter().any(|arg| arg.starts_with("--dhcp-range"));
    if !named {
        command.arg(format!(
            "--dhcp-range={},{},{},{LEASE_SECONDS}",
            pool.first,
            pool.last,
            pool.netmask(),
        ));
    }
    if let Some(seconds) = pool.renewal {
        command.arg(format!("--dhcp-option=option:T1,{seconds}"));
    }
    command.args(args);
    Ok((store, Process::spawn(dir, "dnsmasq", &mut command)?))
}

/// As libvirt's network driver does it: all but a few things in a file that it writes, and no lease
/// file of dnsmasq's own; a helper of libvirt's keeps them.
fn libvirt(
    dir: &Path,
    netns: &NetNs,
    link: &str,
    pool: &Pool,
    args: &[&str],
) -> Result<(PathBuf, Process)> {
    let at = |name: &str| dir.join(name).display().to_string();
    let store = dir.join(format!("{link}.status"));
    for empty in ["default.hostsfile", "default.addnhosts"] {
        fs::write(dir.join(empty), "")?;
    }
    let config = LIBVIRT_CONF
        .replace("@DIR@", &dir.display().to_string())
        .replace("@BRIDGE@", link)
        .replace("@FIRST@", &pool.first.to_string())
        .replace("@LAST@", &pool.last.to_string())
        .replace("@NETMASK@", &pool.netmask().to_string())
        .replace("@SECONDS@", &LEASE_SECONDS.to_string());
    fs::write(dir.join("default.conf"), config)?;
    fs::write(&store, "")?;
    let helper = dir.join("leaseshelper");
    let text = LEASES_HELPER.replace("@STORE@", &store.display().to_string());
    fs::write(&helper, text)?;
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755))?;
    let mut command = netns.command(foreign("dnsmasq")?);
    command
        .arg(format!("--conf-file={}", at("default.conf")))
        .arg("--leasefile-ro")
        .arg(format!("--dhcp-script={}", helper.display()))
        // It would go to the background and to syslog otherwise, and be a user that cannot see the
        // lab's files.
        .args(["--keep-in-foreground", "--log-facility=-", "--log-dhcp"])
        .arg("--user=root")
        .args(args);
    Ok((store, Process::spawn(dir, "dnsmasq", &mut command)?))
}

const LIBVIRT_CONF: &str = "\
strict-order
pid-file=@DIR@/default.pid
except-interface=lo
bind-dynamic
interface=@BRIDGE@
dhcp-range=@FIRST@,@LAST@,@NETMASK@,@SECONDS@s
dhcp-no-override
dhcp-authoritative
dhcp-lease-max=253
dhcp-hostsfile=@DIR@/default.hostsfile
addn-hosts=@DIR@/default.addnhosts
";

/// What dnsmasq tells of leases, kept in the lines that it wants to be told at its start. libvirt's
/// own helper keeps the same in JSON.
const LEASES_HELPER: &str = r#"#!/bin/sh
set -e
action=$1 mac=$2 ip=$3 name=${4:-*}
case "$action" in
init) exec cat @STORE@ ;;
add | old | del) ;;
*) exit 0 ;;
esac
{
    while read -r expiry was_mac was_ip rest; do
        if [ "$was_ip" != "$ip" ]; then
            echo "$expiry $was_mac $was_ip $rest"
        fi
    done <@STORE@
    if [ "$action" != del ]; then
        echo "$DNSMASQ_LEASE_EXPIRES $mac $ip $name ${DNSMASQ_CLIENT_ID:-*}"
    fi
} >@STORE@.new
mv @STORE@.new @STORE@
"#;

fn kea(dir: &Path, netns: &NetNs, link: &str, pool: &Pool) -> Result<(PathBuf, Process)> {
    let store = dir.join("kea-leases4.csv");
    let mut config = json!({"Dhcp4": {
        "interfaces-config": {"interfaces": [link], "dhcp-socket-type": "raw"},
        "lease-database": {
            "type": "memfile",
            "persist": true,
            "name": store,
            "lfc-interval": 0,
        },
        "valid-lifetime": LEASE_SECONDS,
        "subnet4": [{
            "id": 1,
            "subnet": format!("{}/{}", pool.subnet(), pool.prefix),
            "pools": [{"pool": format!("{} - {}", pool.first, pool.last)}],
        }],
        "loggers": [{
            "name": "kea-dhcp4",
            "severity": "INFO",
            "output_options": [{"output": "stdout"}],
        }],
    }});
    if let Some(seconds) = pool.renewal {
        config["Dhcp4"]["renew-timer"] = seconds.into();
    }
    let file = dir.join("kea.json");
    fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
    let mut command = netns.command(foreign("kea-dhcp4")?);
    command
        .env("KEA_PIDFILE_DIR", dir)
        .env("KEA_LOCKFILE_DIR", dir)
        .arg("-c")
        .arg(&file);
    Ok((store, Process::spawn(dir, "kea", &mut command)?))
}

fn isc(dir: &Path, netns: &NetNs, link: &str, pool: &Pool) -> Result<(PathBuf, Process)> {
    let store = dir.join("dhcpd.leases");
    fs::write(&store, "")?;
    let file = dir.join("dhcpd.conf");
    fs::write(
        &file,
        format!(
            "default-lease-time {LEASE_SECONDS};
             max-lease-time {LEASE_SECONDS};
             authoritative;
             ping-check false;
             {}
             {}
             subnet {} netmask {} {{ range {} {}; }}\n",
            if pool.leasequery {
                "allow leasequery;"
            } else {
                ""
            },
            pool.renewal
                .map(|seconds| format!("option dhcp-renewal-time {seconds};"))
                .unwrap_or_default(),
            pool.subnet(),
            pool.netmask(),
            pool.first,
            pool.last,
        ),
    )?;
    let mut command = netns.command(foreign("dhcpd")?);
    command
        .args(["-4", "-f", "-d", "--no-pid", "-cf"])
        .arg(&file)
        .arg("-lf")
        .arg(&store)
        .arg(link);
    Ok((store, Process::spawn(dir, "dhcpd", &mut command)?))
}

/// `EXPIRY MAC IP NAME CLIENT-ID` a line; a lease is gone with its line.
fn dnsmasq_leases(text: &str, now: u64) -> Result<Vec<Lease>> {
    let mut leases = Vec::new();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let (Some(expiry), Some(mac), Some(ip)) = (fields.next(), fields.next(), fields.next())
        else {
            bail!("short line {line:?}");
        };
        let expiry: u64 = expiry.parse()?;
        // Zero is never.
        if expiry == 0 || expiry > now {
            leases.push(Lease {
                ip: ip.parse()?,
                mac: mac.parse()?,
            });
        }
    }
    Ok(leases)
}

/// A row is appended for each change; a deleted lease's last row has no lifetime.
fn kea_leases(text: &str, now: u64) -> Result<Vec<Lease>> {
    let mut last = BTreeMap::new();
    for line in whole_lines(text).skip(1) {
        let fields: Vec<_> = line.split(',').collect();
        // address,hwaddr,client_id,valid_lifetime,expire,subnet_id,fqdn_fwd,fqdn_rev,hostname,state
        let [ip, mac, _, lifetime, expire, _, _, _, _, state, ..] = fields[..] else {
            bail!("short row {line:?}");
        };
        let active = state == "0" && lifetime != "0" && expire.parse::<u64>()? > now;
        // A declined address has a row without a MAC.
        let mac = active.then(|| mac.parse::<Mac>()).transpose()?;
        last.insert(ip.parse::<Ipv4Addr>()?, mac);
    }
    let lease = |(ip, mac): (Ipv4Addr, Option<Mac>)| mac.map(|mac| Lease { ip, mac });
    Ok(last.into_iter().filter_map(lease).collect())
}

/// An entry is appended for each change; the last one counts.
fn isc_leases(text: &str) -> Result<Vec<Lease>> {
    let mut last = BTreeMap::new();
    let mut entry: Option<(Ipv4Addr, Option<Mac>, bool)> = None;
    for line in whole_lines(text).map(str::trim) {
        if let Some(rest) = line.strip_prefix("lease ") {
            entry = Some((rest.trim_end_matches(['{', ' ']).parse()?, None, false));
            continue;
        }
        let Some((ip, mac, active)) = &mut entry else {
            continue;
        };
        if let Some(state) = line.strip_prefix("binding state ") {
            *active = state == "active;";
        }
        if let Some(text) = line.strip_prefix("hardware ethernet ") {
            *mac = Some(text.trim_end_matches(';').parse()?);
        }
        if line == "}" {
            last.insert(*ip, mac.filter(|_| *active));
            entry = None;
        }
    }
    let lease = |(ip, mac): (Ipv4Addr, Option<Mac>)| mac.map(|mac| Lease { ip, mac });
    Ok(last.into_iter().filter_map(lease).collect())
}

/// Without a last line that is still being written.
fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'))
}

fn stamp(path: &Path) -> Result<(Duration, u64, u64)> {
    let meta = fs::metadata(path).with_context(|| path.display().to_string())?;
    let modified = Duration::new(
        meta.mtime().try_into().unwrap_or(0),
        meta.mtime_nsec().try_into().unwrap_or(0),
    );
    Ok((modified, meta.size(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::vm_mac;

    #[test]
    fn who_runs_or_writes_does_not_rest() {
        let status = |state| {
            format!(
                "Name:\tx\nState:\t{state}\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t9\n"
            )
        };
        assert_eq!(sleeps(&status("S (sleeping)")), Some(7));
        assert_eq!(sleeps(&status("T (stopped)")), Some(7));
        for busy in ["R (running)", "D (disk sleep)"] {
            assert_eq!(sleeps(&status(busy)), None);
        }
        assert_eq!(sleeps("Name:\tx\nState:\tZ (zombie)\n"), Some(0));
    }

    fn lease(n: u8) -> Lease {
        Lease {
            ip: pool_ip(n),
            mac: vm_mac(n),
        }
    }

    #[test]
    fn dnsmasq_lines() {
        let text = "1000 02:da:00:00:00:01 10.67.0.101 vm1 01:02\n\
                    10 02:da:00:00:00:02 10.67.0.102 * *\n";
        assert_eq!(dnsmasq_leases(text, 500).unwrap(), [lease(1)]);
        assert_eq!(dnsmasq_leases(text, 5).unwrap(), [lease(1), lease(2)]);
        assert!(dnsmasq_leases("1000 02:da", 5).is_err());
    }

    #[test]
    fn kea_last_whole_row_wins() {
        let head = "address,hwaddr,client_id,valid_lifetime,expire,subnet_id,fqdn_fwd,fqdn_rev,\
                    hostname,state,user_context\n";
        let bound = "10.67.0.101,02:da:00:00:00:01,,3600,1000,1,0,0,,0,\n";
        let freed = "10.67.0.101,02:da:00:00:00:01,,0,1000,1,0,0,,0,\n";
        let torn = "10.67.0.101,02:da:00:00";
        let kea = |rows: &[&str]| kea_leases(&format!("{head}{}", rows.concat()), 500).unwrap();
        assert_eq!(kea(&[bound, torn]), [lease(1)]);
        assert_eq!(kea(&[bound, freed]), []);
        assert_eq!(kea(&[bound, freed, bound]), [lease(1)]);
        assert_eq!(kea(&["10.67.0.101,,,3600,1000,1,0,0,,1,\n"]), []);
    }

    #[test]
    fn isc_last_whole_entry_wins() {
        let entry = |state: &str| {
            format!(
                "lease 10.67.0.101 {{\n  binding state {state};\n  next binding state free;\n  \
                 hardware ethernet 02:da:00:00:00:01;\n}}\n"
            )
        };
        let isc = |text: &str| isc_leases(text).unwrap();
        assert_eq!(isc(&entry("active")), [lease(1)]);
        assert_eq!(isc(&(entry("active") + &entry("free"))), []);
        let torn = "lease 10.67.0.101 {\n  binding state free;\n";
        assert_eq!(isc(&(entry("active") + torn)), [lease(1)]);
    }
}
