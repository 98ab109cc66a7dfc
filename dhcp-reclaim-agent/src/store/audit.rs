//! The audit trail: a line of JSON for each decision to release, with its evidence.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    net::Ipv4Addr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::OperatorEntry;
use crate::{
    control::EventView,
    core::{MacAddr, PortLoss},
};

const FILE: &str = "audit.jsonl";
/// A file that has grown to this is moved aside, and as many such files are kept.
const FILE_BYTES: u64 = 16 << 20;
const OLD_FILES: u32 = 7;

/// Why an address was released, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditEntry {
    pub number: u64,
    pub ts: Timestamp,
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
    #[serde(default)]
    pub client_id: Option<String>,
    pub segment: String,
    pub vlan: u16,
    pub port: String,
    pub server: Ipv4Addr,
    pub server_mac: Option<MacAddr>,
    /// The server's ACK was seen.
    #[serde(default)]
    pub acked: bool,
    /// The address itself was seen at the VM's own port.
    #[serde(default)]
    pub seen_alive: bool,
    #[serde(default)]
    pub lease_expires_at: Option<Timestamp>,
    /// How the port went; `None`: it was up, and its VM silent.
    #[serde(default)]
    pub port_lost: Option<PortLoss>,
    /// No frame of the VM was seen since.
    pub silent_since: Timestamp,
    pub silent_for_ms: u64,
    /// Probes that left since then, and none was answered.
    pub probes: u32,
    pub gates: Vec<AuditGate>,
    pub xid: u32,
    /// What the kernel half wrote into the order: `sent`, `vetoed`, `unwatched`, or `none` if the
    /// frame never came by. `None`: there is no such order.
    #[serde(default)]
    pub verdict: Option<String>,
    /// Who ordered it against which gates; `None`: nobody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    pub outcome: AuditOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditGate {
    pub gate: String,
    pub verdict: String,
    pub reason: String,
}

/// What became of a RELEASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuditOutcome {
    /// Decided, and the frame has not left yet.
    Intended,
    /// The agent ended between the decision and the answer, and the kernel half does not know it
    /// either.
    Unknown,
    Sent,
    /// The kernel half saw the VM after the decision.
    Vetoed,
    /// It could not be sent, or the agent ended before it was.
    Failed,
    DryRun,
}

/// A line of the trail. Names are a contract.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "audit", rename_all = "kebab-case")]
pub enum AuditLine {
    Release(AuditEntry),
    /// What was heard of a RELEASE after it had left.
    Outcome(EventView),
    /// What a person had the agent do.
    Operator(OperatorEntry),
}

/// The file that lines are appended to. What cannot be written is lost, counted and warned about:
/// the agent goes on, for the dead do not wait for a disk.
#[derive(Debug)]
pub struct Trail {
    path: PathBuf,
    file_bytes: u64,
    file: Option<Open>,
    lost: u64,
    failing: bool,
}

#[derive(Debug)]
struct Open {
    file: File,
    length: u64,
}

impl Trail {
    /// Of the agent that keeps its state in `dir`. Nothing is opened yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join(FILE),
            file_bytes: FILE_BYTES,
            file: None,
            lost: 0,
            failing: false,
        }
    }

    /// Lines that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Appends the lines and syncs the file.
    pub fn append(&mut self, lines: &[AuditLine]) {
        if lines.is_empty() {
            return;
        }
        match self.try_append(lines) {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    info!(lost = self.lost, "the audit trail can be written again");
                }
            }
            Err(error) => {
                self.lost += lines.len() as u64;
                // Opened anew with the next line: the folder may be another one by then.
                self.file = None;
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(
                        file = %self.path.display(),
                        %error,
                        "the audit trail cannot be written: its lines are lost until it can"
                    );
                }
            }
        }
    }

    fn try_append(&mut self, lines: &[AuditLine]) -> io::Result<()> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
        }
        let mut open = match self.file.take() {
            Some(open) => open,
            None => Open::at(&self.path)?,
        };
        if open.length > 0 && open.length + text.len() as u64 > self.file_bytes {
            rotate(&self.path)?;
            open = Open::at(&self.path)?;
        }
        open.append(&text)?;
        self.file = Some(open);
        Ok(())
    }
}

impl Open {
    fn at(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        let length = file.seek(SeekFrom::End(0))?;
        let mut open = Self { file, length };
        if !open.ends_with_line()? {
            // The machine ended in the middle of a line.
            open.append(b"\n")?;
        }
        Ok(open)
    }

    fn ends_with_line(&mut self) -> io::Result<bool> {
        let Some(last) = self.length.checked_sub(1) else {
            return Ok(true);
        };
        self.file.seek(SeekFrom::Start(last))?;
        let mut byte = [0];
        self.file.read_exact(&mut byte)?;
        Ok(byte == *b"\n")
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        let written = self
            .file
            .write_all(text)
            .and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // Half a line would spoil the next one. It is cut off again, if the disk lets us.
            let _half = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += text.len() as u64;
        Ok(())
    }
}

/// `audit.jsonl` becomes `audit.jsonl.1`, that one `.2`, and so on; the oldest goes.
fn rotate(path: &Path) -> io::Result<()> {
    let numbered = |number: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    };
    for number in (1..OLD_FILES).rev() {
        match fs::rename(numbered(number), numbered(number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    fs::rename(path, numbered(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Peer;

    fn line(number: usize) -> AuditLine {
        AuditLine::Operator(OperatorEntry {
            ts: Timestamp::UNIX_EPOCH,
            by: Peer { uid: 0, pid: 1 },
            order: "pause".to_owned(),
            text: Some(format!("{number:>100}")),
        })
    }

    fn read(path: &Path) -> Vec<AuditLine> {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn grows_by_lines_and_is_rotated_by_size_into_so_many_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut trail = Trail::new(dir.path());
        trail.file_bytes = 1000;
        for number in 0..200 {
            trail.append(&[line(number)]);
        }
        assert_eq!(trail.lost(), 0);
        let mut files: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
        files.sort_by_key(|file| std::cmp::Reverse(file.file_name()));
        assert_eq!(files.len() as u32, OLD_FILES + 1);
        let mut all = Vec::new();
        for file in files {
            assert!(file.metadata().unwrap().len() <= 1000);
            all.extend(read(&file.path()));
        }
        let last: Vec<_> = (200 - all.len()..200).map(line).collect();
        assert_eq!(all, last, "the latest, in order and without a gap");
    }

    #[test]
    fn a_torn_line_is_closed_and_the_file_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        fs::write(&path, "{\"audit\":\"opera").unwrap();
        let mut trail = Trail::new(dir.path());
        trail.append(&[line(1)]);
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            serde_json::from_str::<AuditLine>(lines[1]).unwrap(),
            line(1)
        );
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_ends_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        // A full disk, as far as a file can be one.
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut trail = Trail::new(dir.path());
        trail.append(&[line(1), line(2)]);
        trail.append(&[line(3)]);
        assert_eq!(trail.lost(), 3);
        fs::remove_file(&path).unwrap();
        trail.append(&[line(4)]);
        assert_eq!((trail.lost(), read(&path)), (3, vec![line(4)]));
        // No folder, and then one again.
        let gone = dir.path().join("gone");
        let mut trail = Trail::new(&gone);
        trail.append(&[line(5)]);
        assert_eq!(trail.lost(), 1);
        fs::create_dir(&gone).unwrap();
        trail.append(&[line(6)]);
        assert_eq!(read(&gone.join(FILE)), [line(6)]);
    }
}
