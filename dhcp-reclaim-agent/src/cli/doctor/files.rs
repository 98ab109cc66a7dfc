//! The control socket, the state folder, and who has them.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    sys::{
        stat::{major, minor},
        statvfs::statvfs,
    },
    unistd::{AccessFlags, access},
};

use super::Chart;
use crate::{
    config::Settings,
    control::{Client, ClientError, Request, Response},
    store,
};

/// With less than this the store may not be written for long.
const ROOM: u64 = 16 << 20;

pub(super) fn look(settings: &Settings, chart: &mut Chart) {
    let running = control(&settings.control, chart);
    state(&settings.state, running, chart);
    if !running {
        pins(&settings.bpffs.join("dhcp-reclaim"), chart);
    }
}

/// Whether an agent answers there.
fn control(path: &Path, chart: &mut Chart) -> bool {
    let shown = path.display();
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match place_of(path) {
                Ok(_) => chart.ok(
                    "control",
                    format!("{shown} can be made; no agent runs here"),
                ),
                Err((folder, why)) => chart.fail(
                    "control",
                    format!("{shown} cannot be made: {} {why}", folder.display()),
                    mend_of(why, "name another place with --control"),
                ),
            }
            return false;
        }
        Err(error) => {
            let mend = format!("ls -ld {shown}, or name another place with --control");
            chart.fail("control", format!("{shown}: {error}"), mend);
            return false;
        }
    };
    if !found.file_type().is_socket() {
        chart.fail(
            "control",
            format!("{shown} is there and is no socket"),
            format!("rm {shown}, or name another place with --control"),
        );
        return false;
    }
    if found.mode() & 0o022 != 0 {
        chart.warn(
            "control",
            format!(
                "{shown} has mode {:o}: others may look (orders are for root all the same)",
                found.mode() & 0o777
            ),
            format!("chmod 600 {shown}"),
        );
    }
    match asked(path) {
        Ok(text) => {
            chart.ok("agent", format!("runs here: {text}"));
            true
        }
        Err(ClientError::NoAgent(_)) => {
            let text = format!("{shown} was left by an agent that is gone; the next one takes it");
            chart.ok("control", text);
            false
        }
        Err(ClientError::Denied(_)) => {
            let text = format!("{shown} may not be used by this user");
            chart.fail("control", text, "sudo dhcp-reclaim doctor");
            true
        }
        Err(error) => {
            let text = format!("{shown}: {}", crate::errors::chain(&error));
            chart.fail("agent", text, "systemctl restart dhcp-reclaim");
            true
        }
    }
}

fn asked(path: &Path) -> Result<String, ClientError> {
    let mut client = Client::connect(path)?;
    let mut text = String::new();
    for answer in client.ask(&Request::Stats)? {
        if let Response::Stats(stats) = answer? {
            let bridges = stats.bridges.join(", ");
            text = format!(
                "version {}, {} ports on {bridges}",
                stats.version, stats.ports
            );
            if let Some(pause) = &stats.paused {
                text = format!("{text}; {}", pause.text());
            }
        }
    }
    Ok(text)
}

/// The folder that is there, on the way to what is to be made; an error says why it is of no use.
fn place_of(path: &Path) -> Result<PathBuf, (PathBuf, &'static str)> {
    let there = path.ancestors().skip(1).find(|folder| folder.exists());
    let folder = there.unwrap_or(Path::new("/")).to_owned();
    if !folder.is_dir() {
        return Err((folder, "is no folder"));
    }
    match access(&folder, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Ok(folder),
        Err(nix::errno::Errno::EROFS) => Err((folder, "is mounted read-only")),
        Err(_) => Err((folder, NOT_OURS)),
    }
}

const NOT_OURS: &str = "may not be written by this user";

fn mend_of(why: &str, else_this: &'static str) -> &'static str {
    if why == NOT_OURS {
        "sudo dhcp-reclaim doctor"
    } else {
        else_this
    }
}

fn state(path: &Path, running: bool, chart: &mut Chart) {
    let shown = path.display();
    let within = path.join(store::FILE);
    let folder = match place_of(&within) {
        Ok(folder) => folder,
        Err((folder, why)) => {
            let mend = match why {
                "is mounted read-only" => format!("mount -o remount,rw {}", folder.display()),
                why => mend_of(why, "name another folder with --state").to_owned(),
            };
            let text = format!("{shown} cannot be used: {} {why}", folder.display());
            return chart.fail("state", text, mend);
        }
    };
    if let Ok(found) = fs::metadata(path)
        && found.mode() & 0o077 != 0
    {
        let mode = found.mode() & 0o777;
        chart.warn(
            "state",
            format!("{shown} has mode {mode:o}: who leases what is open to others"),
            format!("chmod 700 {shown}"),
        );
    }
    if let Ok(room) = statvfs(&folder) {
        let free = room.blocks_available().saturating_mul(room.fragment_size());
        if free < ROOM {
            return chart.warn(
                "state",
                format!("{shown} has room for {} KiB only", free >> 10),
                "make room: what cannot be written down is not released",
            );
        }
    }
    match holder(&within) {
        Some(pid) if !running => chart.fail(
            "agent",
            format!("{shown} is in use by {pid}, an agent with another control socket"),
            "stop that one, or give this one another --state",
        ),
        Some(_) => chart.ok("state", format!("{shown} is the agent's that runs here")),
        None if path.exists() => chart.ok("state", format!("{shown} can be written")),
        None => chart.ok("state", format!("{shown} can be made")),
    }
}

fn pins(folder: &Path, chart: &mut Chart) {
    if let Some(pid) = holder(folder) {
        chart.fail(
            "agent",
            format!(
                "{} is in use by {pid}, an agent of this node",
                folder.display()
            ),
            "stop that one: one agent follows all bridges of a node",
        );
    }
}

/// Who has locked it, by /proc/locks: to try would be to lock it.
fn holder(path: &Path) -> Option<String> {
    let found = fs::metadata(path).ok()?;
    let (device, inode) = (found.dev(), found.ino());
    let id = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let pid = locked_by(&locks, &id)?;
    // A lock of the open file's own (F_OFD_SETLK) is no process's.
    let pid = if pid > 0 { Some(pid) } else { opened_by(path) };
    Some(pid.map_or("a process elsewhere".to_owned(), |pid| {
        format!("process {pid}")
    }))
}

fn opened_by(path: &Path) -> Option<i32> {
    let path = fs::canonicalize(path).ok()?;
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().find(|pid: &i32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut files = files.into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|open| open == path))
    })
}

/// `1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF`
fn locked_by(locks: &str, id: &str) -> Option<i32> {
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == id)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_lock_is() {
        let locks = "1: FLOCK  ADVISORY  WRITE 812 fd:01:5678 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE -1 00:1a:99 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 900 fd:01:77 0 EOF\n";
        assert_eq!(locked_by(locks, "fd:01:5678"), Some(812));
        assert_eq!(locked_by(locks, "00:1a:99"), Some(-1));
        assert_eq!(locked_by(locks, "fd:01:567"), None);
    }
}
