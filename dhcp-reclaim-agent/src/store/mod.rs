//! The agent's memory: one redb file with what must outlive the process, and the audit trail.
//!
//! A commit is in the file, and synced, when it returns: `kill -9` loses nothing that was committed,
//! and neither does the machine's own end. What was not committed by then is read again from the
//! record ring, which forgets nothing before the commit (`kernel::RecordRing`).

#![forbid(unsafe_code)]

mod audit;
mod row;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _,
    ReadableTableMetadata as _, StorageError, TableDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use tracing::warn;

pub use self::{
    audit::{AuditEntry, AuditGate, AuditOutcome},
    row::{BindingRow, PortRow, TransactionRow},
};
use crate::core::Time;

const FILE: &str = "bindings.redb";
/// Changes whenever rows mean something else.
const FORMAT: u64 = 1;
/// RELEASE decisions that are kept.
const AUDIT_ENTRIES: u64 = 10_000;
/// The file is small; redb's own default is a gigabyte.
const CACHE_BYTES: usize = 4 << 20;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("dhcp-reclaim");
const BINDINGS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("bindings");
const TRANSACTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("transactions");
const PORTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("ports");
const AUDIT: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("audit");

/// The store cannot be used, and it is not the file's contents that are to blame.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{} is in use by another agent: stop that one, or give this one another --state", path.display())]
    Locked { path: PathBuf },
    #[error("cannot use {}", path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        source: Box<redb::Error>,
    },
}

/// Both clocks at one moment, and the boot that the monotonic one belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    pub boot: String,
    pub monotonic: Time,
    pub wall: Timestamp,
}

/// Everything that an earlier agent left.
#[derive(Debug, Default)]
pub struct Memory {
    pub bindings: Vec<BindingRow>,
    pub transactions: Vec<TransactionRow>,
    pub ports: Vec<PortRow>,
}

/// What is to be written in one go. A key without a value is deleted.
#[derive(Debug, Default)]
pub struct Batch {
    bindings: Vec<(String, Option<Vec<u8>>)>,
    transactions: Vec<(String, Option<Vec<u8>>)>,
    ports: Vec<(String, Option<Vec<u8>>)>,
    audit: Vec<(u64, Vec<u8>)>,
}

impl Batch {
    pub fn binding(&mut self, key: String, row: Option<&BindingRow>) {
        self.bindings.push((key, row.map(encode)));
    }

    pub fn transaction(&mut self, key: String, row: Option<&TransactionRow>) {
        self.transactions.push((key, row.map(encode)));
    }

    pub fn port(&mut self, key: String, row: Option<&PortRow>) {
        self.ports.push((key, row.map(encode)));
    }

    pub fn audit(&mut self, entry: &AuditEntry) {
        self.audit.push((entry.number, encode(entry)));
    }
}

#[derive(Debug)]
pub struct Store {
    db: Database,
    path: PathBuf,
    next_audit: u64,
}

impl Store {
    /// Opens the store in `dir`, or makes it. A file that is damaged, of a newer version or not ours
    /// is set aside, and the agent starts without it.
    pub fn open(dir: &Path, now: Timestamp) -> Result<(Self, Memory), StoreError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| path_error(dir, source))?;
        let path = dir.join(FILE);
        match Self::try_open(&path) {
            Ok(opened) => return Ok(opened),
            Err(Refused::Store(error)) => return Err(error),
            Err(Refused::Contents(why)) => set_aside(&path, &why, now)?,
        }
        Self::try_open(&path).map_err(|refused| match refused {
            Refused::Store(error) => error,
            Refused::Contents(why) => path_error(&path, io::Error::other(why)),
        })
    }

    /// Writes the batch and syncs the file.
    pub fn commit(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.write(batch).map_err(|error| StoreError::Write {
            path: self.path.clone(),
            source: Box::new(error),
        })
    }

    /// The number of the next entry of the audit trail.
    pub fn next_audit(&mut self) -> u64 {
        let number = self.next_audit;
        self.next_audit += 1;
        number
    }

    /// The audit trail, oldest first.
    pub fn audit(&self) -> Result<Vec<AuditEntry>, StoreError> {
        let read = || -> Result<Vec<AuditEntry>, redb::Error> {
            let table = self.db.begin_read()?.open_table(AUDIT)?;
            let mut entries = Vec::new();
            for row in table.iter()? {
                let (_, value) = row?;
                entries.extend(decode(value.value()));
            }
            Ok(entries)
        };
        read().map_err(|error| StoreError::Write {
            path: self.path.clone(),
            source: Box::new(error),
        })
    }

    fn write(&self, batch: &Batch) -> Result<(), redb::Error> {
        // The default durability: a commit is on the disk when it returns.
        let transaction = self.db.begin_write()?;
        for (definition, changes) in [
            (BINDINGS, &batch.bindings),
            (TRANSACTIONS, &batch.transactions),
            (PORTS, &batch.ports),
        ] {
            if changes.is_empty() {
                continue;
            }
            let mut table = transaction.open_table(definition)?;
            for (key, value) in changes {
                match value {
                    Some(value) => drop(table.insert(key.as_str(), value.as_slice())?),
                    None => drop(table.remove(key.as_str())?),
                }
            }
        }
        if !batch.audit.is_empty() {
            let mut table = transaction.open_table(AUDIT)?;
            for (number, value) in &batch.audit {
                table.insert(number, value.as_slice())?;
            }
            while table.len()? > AUDIT_ENTRIES {
                table.pop_first()?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    fn try_open(path: &Path) -> Result<(Self, Memory), Refused> {
        let db = Builder::new()
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true)
            .create(path)
            .map_err(|error| Refused::of_database(path, error))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(|source| Refused::Store(path_error(path, source)))?;
        let mut store = Self {
            db,
            path: path.to_owned(),
            next_audit: 0,
        };
        store.check_format()?;
        let memory = store.read().map_err(|error| Refused::of(path, error))?;
        Ok((store, memory))
    }

    /// Whose file it is, and of which version; a new one is made ours.
    fn check_format(&self) -> Result<(), Refused> {
        let refused = |error| Refused::of(&self.path, error);
        let (known, empty) = self.format().map_err(refused)?;
        match known {
            Some(FORMAT) => Ok(()),
            Some(newer) if newer > FORMAT => Err(Refused::Contents(format!(
                "it is of version {newer}, and this agent knows versions up to {FORMAT}"
            ))),
            Some(other) => Err(Refused::Contents(format!("version {other} was never used"))),
            None if empty => self.make_ours().map_err(refused),
            None => Err(Refused::Contents(
                "it is another program's database".to_owned(),
            )),
        }
    }

    fn format(&self) -> Result<(Option<u64>, bool), redb::Error> {
        let read = self.db.begin_read()?;
        let empty = read.list_tables()?.next().is_none();
        let known = match read.open_table(META) {
            Ok(table) => table.get("format")?.map(|format| format.value()),
            Err(
                redb::TableError::TableDoesNotExist(_)
                | redb::TableError::TableTypeMismatch { .. }
                | redb::TableError::TableIsMultimap(_)
                | redb::TableError::TypeDefinitionChanged { .. },
            ) => None,
            Err(error) => return Err(error.into()),
        };
        Ok((known, empty))
    }

    fn make_ours(&self) -> Result<(), redb::Error> {
        let transaction = self.db.begin_write()?;
        transaction.open_table(META)?.insert("format", FORMAT)?;
        for table in [BINDINGS, TRANSACTIONS, PORTS] {
            transaction.open_table(table)?;
        }
        transaction.open_table(AUDIT)?;
        transaction.commit()?;
        Ok(())
    }

    fn read(&mut self) -> Result<Memory, redb::Error> {
        let read = self.db.begin_read()?;
        let mut memory = Memory::default();
        for row in read.open_table(BINDINGS)?.iter()? {
            memory.bindings.extend(decode(row?.1.value()));
        }
        for row in read.open_table(TRANSACTIONS)?.iter()? {
            memory.transactions.extend(decode(row?.1.value()));
        }
        for row in read.open_table(PORTS)?.iter()? {
            memory.ports.extend(decode(row?.1.value()));
        }
        let audit = read.open_table(AUDIT)?;
        self.next_audit = audit.last()?.map_or(0, |(number, _)| number.value() + 1);
        let mut unknown = Batch::default();
        for row in audit.iter()? {
            let entry: Option<AuditEntry> = decode(row?.1.value());
            let Some(mut entry) = entry else { continue };
            if entry.outcome == AuditOutcome::Intended {
                entry.outcome = AuditOutcome::Unknown;
                unknown.audit(&entry);
            }
        }
        if !unknown.audit.is_empty() {
            self.write(&unknown)?;
        }
        Ok(memory)
    }
}

/// Why a file is not opened.
enum Refused {
    /// What is in it is of no use: without it the agent can go on.
    Contents(String),
    /// Without it would be no better.
    Store(StoreError),
}

impl Refused {
    fn of_database(path: &Path, error: DatabaseError) -> Self {
        match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                Self::Store(StoreError::Locked {
                    path: path.to_owned(),
                })
            }
            DatabaseError::UpgradeRequired(version) => Self::Contents(format!(
                "its file format {version} is one that this agent cannot read"
            )),
            error => Self::of(path, error.into()),
        }
    }

    fn of(path: &Path, error: redb::Error) -> Self {
        match error {
            // With a number it is the system that refuses: permissions, a full disk, a broken one.
            redb::Error::Io(source) if source.raw_os_error().is_some() => {
                Self::Store(path_error(path, source))
            }
            error => Self::Contents(error.to_string()),
        }
    }
}

/// Nothing is deleted: somebody may want to look at it.
fn set_aside(path: &Path, why: &str, now: Timestamp) -> Result<(), StoreError> {
    let stamp = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let aside = path.with_extension(format!("redb.bad-{stamp}"));
    fs::rename(path, &aside).map_err(|source| path_error(path, source))?;
    warn!(
        file = %path.display(),
        set_aside = %aside.display(),
        why,
        "the state file cannot be used: starting without it. Leases of before now are learned again \
         as they are renewed; those of VMs that die until then run out by themselves. Delete the file \
         that was set aside, or keep it to find out what happened"
    );
    Ok(())
}

fn path_error(path: &Path, source: io::Error) -> StoreError {
    StoreError::Path {
        path: path.to_owned(),
        source,
    }
}

fn encode<T: Serialize>(row: &T) -> Vec<u8> {
    serde_json::to_vec(row).unwrap_or_else(|error| {
        // Maps with keys that are no strings, say; rows have none.
        warn!(%error, "a row cannot be encoded");
        Vec::new()
    })
}

/// A row that cannot be read is one lease forgotten, not all.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    serde_json::from_slice(bytes)
        .inspect_err(|error| warn!(%error, "a row of the state file cannot be read"))
        .ok()
}

impl From<StorageError> for Refused {
    fn from(error: StorageError) -> Self {
        Self::Contents(error.to_string())
    }
}
