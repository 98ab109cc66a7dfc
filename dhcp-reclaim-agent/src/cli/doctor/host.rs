//! The kernel, its BPF, and what this process may do.

use std::{
    fs,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::{ProgramType, SchedClassifier, tc::TcAttachType},
    sys::{is_map_supported, is_program_supported},
};
use nix::sys::{
    resource::{Resource, getrlimit},
    statfs::{BPF_FS_MAGIC, statfs},
};

use super::Chart;
use crate::{clock, config::Settings};

/// By number: what the agent needs, and for what.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "attach programs to ports"),
    (13, "CAP_NET_RAW", "send probes and RELEASEs"),
    (38, "CAP_PERFMON", "load programs"),
    (39, "CAP_BPF", "load programs"),
];
const SYS_ADMIN: u32 = 21;
const SYS_RESOURCE: u32 = 24;
/// What maps may come to, before Linux 5.11 lets them be counted elsewhere.
const LOCKED: u64 = 64 << 20;
/// Before this no clock of a running agent can be.
const EPOCH: &str = "2024-01-01T00:00:00Z";

pub(super) fn look(settings: &Settings, chart: &mut Chart) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = version(&release).unwrap_or_default();
    let capabilities = capabilities();
    kernel(release.trim(), version, chart);
    held(capabilities, chart);
    bpf(capabilities, chart);
    jit(&read("/proc/sys/net/core/bpf_jit_enable"), chart);
    bpffs(&settings.bpffs, chart);
    memlock(version, capabilities, chart);
    lockdown(&read("/sys/kernel/security/lockdown"), chart);
    time(chart);
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// `6.1.0-18-amd64` is (6, 1).
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(release: &str, version: (u32, u32), chart: &mut Chart) {
    match version {
        (0..=4, _) | (5, 0..=7) => chart.fail(
            "kernel",
            format!("Linux {release} is too old: it has no ring buffer for BPF programs"),
            "boot Linux 5.8 or newer",
        ),
        (5, _) | (6, 0..=5) => chart.ok(
            "kernel",
            format!(
                "Linux {release}: clsact, unless tcx was carried back. Others may remove filters \
                 from a clsact; they are looked after and put back"
            ),
        ),
        _ => chart.ok("kernel", format!("Linux {release}: tcx")),
    }
}

fn capabilities() -> u64 {
    let status = read("/proc/thread-self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.unwrap_or(0)
}

fn has(capabilities: u64, number: u32) -> bool {
    let bit = |number: u32| capabilities & (1 << number) != 0;
    // The last two were split off from it in Linux 5.8.
    bit(number) || (number >= 38 && bit(SYS_ADMIN))
}

fn held(capabilities: u64, chart: &mut Chart) {
    let missing = CAPABILITIES
        .iter()
        .filter(|(number, ..)| !has(capabilities, *number));
    let missing: Vec<String> = missing
        .map(|(_, name, what)| format!("{name} ({what})"))
        .collect();
    if missing.is_empty() {
        return chart.ok("capabilities", "all that the agent needs are here");
    }
    chart.fail(
        "capabilities",
        format!("this process lacks {}", missing.join(", ")),
        "sudo dhcp-reclaim doctor, and run the agent as root or by its unit",
    );
}

fn bpf(capabilities: u64, chart: &mut Chart) {
    if !has(capabilities, 39) {
        // Nothing can be tried; what is missing was said.
        return;
    }
    let mut lacks = Vec::new();
    if let Ok(false) = is_program_supported(ProgramType::SchedClassifier) {
        lacks.push("programs at traffic control (CONFIG_NET_CLS_ACT, CONFIG_NET_CLS_BPF)");
    }
    if let Ok(false) = is_map_supported(MapType::RingBuf) {
        lacks.push("the ring buffer (CONFIG_BPF_SYSCALL)");
    }
    if !lacks.is_empty() {
        let text = format!("the kernel lacks {}", lacks.join(" and "));
        return chart.fail("bpf", text, "boot a kernel of a distribution, 5.8 or newer");
    }
    let tcx = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok();
    let hook = if tcx { "tcx" } else { "clsact" };
    chart.ok(
        "bpf",
        format!("programs, ring buffer, {hook}; BTF of the kernel is not needed"),
    );
}

fn jit(setting: &Option<String>, chart: &mut Chart) {
    match setting.as_deref().map(str::trim) {
        Some("0") => chart.warn(
            "jit",
            "the BPF compiler is off: every frame of every VM costs many times more",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(_) => chart.ok("jit", "the BPF compiler is on"),
        None => chart.ok("jit", "not told in this network namespace"),
    }
}

fn bpffs(path: &Path, chart: &mut Chart) {
    let shown = path.display();
    match statfs(path) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => {
            chart.ok("bpffs", format!("mounted at {shown}"));
        }
        Ok(_) => chart.fail(
            "bpffs",
            format!("{shown} is no BPF file system: programs and maps could not outlive the agent"),
            format!("mount -t bpf bpf {shown}"),
        ),
        Err(error) => chart.fail(
            "bpffs",
            format!("{shown} is not there: {}", error.desc()),
            format!("mkdir -p {shown} && mount -t bpf bpf {shown}"),
        ),
    }
}

fn memlock(version: (u32, u32), capabilities: u64, chart: &mut Chart) {
    if version >= (5, 11) {
        return chart.ok(
            "memlock",
            "maps do not count as locked memory on this kernel",
        );
    }
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    if limit >= LOCKED || has(capabilities, SYS_RESOURCE) {
        return chart.ok("memlock", "enough memory may be locked for maps");
    }
    chart.fail(
        "memlock",
        format!(
            "before Linux 5.11 maps count as locked memory, of which {limit} bytes are allowed"
        ),
        "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
    );
}

fn lockdown(state: &Option<String>, chart: &mut Chart) {
    let mode = state.as_deref().and_then(|text| {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    });
    let mode = mode.unwrap_or_else(|| "none".to_owned());
    chart.ok(
        "lockdown",
        format!("{mode}; the programs read no kernel memory, which is what it forbids"),
    );
}

fn time(chart: &mut Chart) {
    let now = clock::wall();
    let earliest = EPOCH.parse().unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    if now < earliest {
        return chart.fail(
            "clock",
            format!("it is {now:.0} here: after a reboot, leases would be carried over wrongly"),
            "timedatectl set-ntp true, or: date -s",
        );
    }
    match clock::boot_id() {
        Ok(_) => chart.ok("clock", format!("{now:.0}, and boots can be told apart")),
        Err(error) => chart.fail(
            "clock",
            format!("the boot's id cannot be read: {error}"),
            "mount -t proc proc /proc",
        ),
    }
}

/// Processes whose command line has `part`, by their names.
pub(super) fn processes_with(part: &str) -> Vec<String> {
    let Ok(all) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let of = |path: PathBuf| {
        let line = fs::read(path.join("cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let name = words.next()?.into_owned();
        let name = name.rsplit('/').next()?.to_owned();
        words.any(|word| word.contains(part)).then_some(name)
    };
    let mut names: Vec<String> = all.flatten().filter_map(|entry| of(entry.path())).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::{super::Health, *};

    fn health(look: impl FnOnce(&mut Chart)) -> (Health, Option<String>) {
        let mut chart = Chart::default();
        look(&mut chart);
        let [finding] = &chart.0[..] else {
            panic!("{chart:?}");
        };
        (finding.health, finding.mend.clone())
    }

    #[test]
    fn kernels() {
        assert_eq!(version("6.1.0-18-amd64\n"), Some((6, 1)));
        assert_eq!(version("5.10.0+"), Some((5, 10)));
        assert_eq!(version("odd"), None);
        for (version, expected) in [
            ((4, 19), Health::Fail),
            ((5, 7), Health::Fail),
            ((5, 8), Health::Ok),
            ((6, 5), Health::Ok),
            ((6, 6), Health::Ok),
        ] {
            let found = health(|chart| kernel("x", version, chart)).0;
            assert_eq!(found, expected, "{version:?}");
        }
    }

    #[test]
    fn capabilities_may_be_part_of_a_greater_one() {
        let mask = |numbers: &[u32]| {
            numbers
                .iter()
                .fold(0_u64, |mask, number| mask | 1 << number)
        };
        for (numbers, expected) in [
            (&[12, 13, 38, 39][..], Health::Ok),
            (&[12, 13, 21], Health::Ok),
            (&[12, 38, 39], Health::Fail),
            (&[], Health::Fail),
        ] {
            let found = health(|chart| held(mask(numbers), chart)).0;
            assert_eq!(found, expected, "{numbers:?}");
        }
    }

    #[test]
    fn settings_of_the_kernel() {
        let off = health(|chart| jit(&Some("0\n".to_owned()), chart));
        assert_eq!(
            off,
            (
                Health::Warn,
                Some("sysctl -w net.core.bpf_jit_enable=1".to_owned())
            )
        );
        assert_eq!(
            health(|chart| jit(&Some("1\n".to_owned()), chart)).0,
            Health::Ok
        );
        let locked = Some("none integrity [confidentiality]\n".to_owned());
        let mut chart = Chart::default();
        lockdown(&locked, &mut chart);
        assert!(chart.0[0].text.starts_with("confidentiality; "));
        assert_eq!(health(|chart| memlock((6, 1), 0, chart)).0, Health::Ok);
        let resource = 1 << SYS_RESOURCE;
        assert_eq!(
            health(|chart| memlock((5, 10), resource, chart)).0,
            Health::Ok
        );
    }
}
