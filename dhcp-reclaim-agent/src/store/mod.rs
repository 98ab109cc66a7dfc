//! The agent's memory: one redb file with what must outlive the process, and beside it the audit
//! trail, for people.
//!
//! A commit is in the file, and synced, when it returns: `kill -9` loses nothing that was committed,
//! and neither does the machine's own end. What was not committed by then is read again from the
//! record ring, which forgets nothing before the commit (`kernel::RecordRing`).

#![forbid(unsafe_code)]

mod audit;
mod operator;
mod row;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use tracing::warn;

pub use self::{
    audit::{AuditEntry, AuditGate, AuditLine, AuditOutcome, Trail},
    operator::OperatorEntry,
    row::{AlarmRow, BindingRow, PortRow, TransactionRow},
};
use crate::{control::PauseView, core::Time};

pub(crate) const FILE: &str = "bindings.redb";
/// Changes whenever rows mean something else. 2: alarms, and what is known of a RELEASE. 3: a pause,
/// which an older agent would not respect.
const FORMAT: u64 = 3;
/// The oldest that can be read: what it lacks is empty.
const OLDEST: u64 = 1;
/// The file is small; redb's own default is a gigabyte.
const CACHE_BYTES: usize = 4 << 20;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("dhcp-reclaim");
const BINDINGS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("bindings");
const TRANSACTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("transactions");
const PORTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("ports");
const ALARMS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("alarms");
/// RELEASEs whose outcome is open: once it is known, the trail has it.
const INTENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("audit");
/// In META: the number of the next one.
const NEXT_INTENT: &str = "next-audit";
/// The node's own row, if it is paused.
const PAUSE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("pause");

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
    /// For how long the host has been suspended since it booted: the monotonic clock stood still.
    pub suspended: Duration,
    pub wall: Timestamp,
}

/// Everything that an earlier agent left.
#[derive(Debug, Default)]
pub struct Memory {
    pub bindings: Vec<BindingRow>,
    pub transactions: Vec<TransactionRow>,
    pub ports: Vec<PortRow>,
    pub alarms: Vec<AlarmRow>,
    /// RELEASEs that were decided, and whose outcome was not written down.
    pub intents: Vec<AuditEntry>,
    /// A person holds all releases.
    pub pause: Option<PauseView>,
}

/// What is to be written in one go. A key without a value is deleted.
#[derive(Debug, Default)]
pub struct Batch {
    bindings: Vec<(String, Option<Vec<u8>>)>,
    transactions: Vec<(String, Option<Vec<u8>>)>,
    ports: Vec<(String, Option<Vec<u8>>)>,
    alarms: Vec<(String, Option<Vec<u8>>)>,
    intents: Vec<(u64, Option<Vec<u8>>)>,
    pause: Vec<(String, Option<Vec<u8>>)>,
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

    pub fn alarm(&mut self, key: String, row: Option<&AlarmRow>) {
        self.alarms.push((key, row.map(encode)));
    }

    /// Kept for as long as its outcome is open.
    pub fn intent(&mut self, entry: &AuditEntry) {
        let open = entry.outcome == AuditOutcome::Intended;
        self.intents
            .push((entry.number, open.then(|| encode(entry))));
    }

    /// `None`: nothing is held any more.
    pub fn pause(&mut self, pause: Option<&PauseView>) {
        self.pause = vec![("node".to_owned(), pause.map(encode))];
    }
}

#[derive(Debug)]
pub struct Store {
    db: Database,
    path: PathBuf,
    next_intent: u64,
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

    /// The number of the next intent, and of its line in the audit trail.
    pub fn next_intent(&mut self) -> u64 {
        let number = self.next_intent;
        self.next_intent += 1;
        number
    }

    fn write(&self, batch: &Batch) -> Result<(), redb::Error> {
        // The default durability: a commit is on the disk when it returns.
        let transaction = self.db.begin_write()?;
        for (definition, changes) in [
            (BINDINGS, &batch.bindings),
            (TRANSACTIONS, &batch.transactions),
            (PORTS, &batch.ports),
            (ALARMS, &batch.alarms),
            (PAUSE, &batch.pause),
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
        if !batch.intents.is_empty() {
            let mut table = transaction.open_table(INTENTS)?;
            for (number, value) in &batch.intents {
                match value {
                    Some(value) => drop(table.insert(number, value.as_slice())?),
                    None => drop(table.remove(number)?),
                }
            }
            transaction
                .open_table(META)?
                .insert(NEXT_INTENT, self.next_intent)?;
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
            next_intent: 0,
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
            Some(OLDEST..FORMAT) => self.make_ours().map_err(refused),
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

    /// Of a file that is empty, or of an older version: an agent of that version sets it aside from
    /// now on.
    fn make_ours(&self) -> Result<(), redb::Error> {
        let transaction = self.db.begin_write()?;
        transaction.open_table(META)?.insert("format", FORMAT)?;
        for table in [BINDINGS, TRANSACTIONS, PORTS, ALARMS, PAUSE] {
            transaction.open_table(table)?;
        }
        transaction.open_table(INTENTS)?;
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
        for row in read.open_table(ALARMS)?.iter()? {
            memory.alarms.extend(decode(row?.1.value()));
        }
        for row in read.open_table(PAUSE)?.iter()? {
            memory.pause = decode(row?.1.value());
        }
        let intents = read.open_table(INTENTS)?;
        let next = read.open_table(META)?.get(NEXT_INTENT)?;
        let after_last = intents.last()?.map_or(0, |(number, _)| number.value() + 1);
        self.next_intent = next.map_or(0, |next| next.value()).max(after_last);
        for row in intents.iter()? {
            // An agent of before kept the settled ones too.
            let entry: Option<AuditEntry> = decode(row?.1.value());
            let intent = entry.filter(|entry| entry.outcome == AuditOutcome::Intended);
            memory.intents.extend(intent);
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::core::{Key, MacAddr, Origin, Saved, State};

    fn now() -> Moment {
        Moment {
            boot: "this".to_owned(),
            monotonic: Time::from_nanos(1_000),
            suspended: Duration::ZERO,
            wall: Timestamp::UNIX_EPOCH,
        }
    }

    fn saved(n: u8) -> Saved {
        Saved {
            key: Key {
                segment: 1,
                vlan: 0,
                ip: Ipv4Addr::new(10, 0, 0, n),
            },
            chaddr: MacAddr([2, 0, 0, 0, 0, n]),
            client_id: Some(vec![7; 200]),
            server: None,
            server_mac: None,
            port: 3,
            port_name: "vm1".to_owned(),
            state: State::Bound,
            origin: Origin::Wire,
            acked: true,
            seen_alive: false,
            shared: false,
            doubt: None,
            expires: None,
            tentative_until: None,
            last_seen: None,
            released: None,
        }
    }

    fn put(store: &mut Store, n: u8, keep: bool) {
        let mut batch = Batch::default();
        let row = BindingRow::new("br0", saved(n), &now());
        let key = BindingRow::key("br0", saved(n).key);
        batch.binding(key, Some(&row).filter(|_| keep));
        store.commit(&batch).unwrap();
    }

    fn open(dir: &Path) -> (Store, Memory) {
        Store::open(dir, Timestamp::UNIX_EPOCH).unwrap_or_else(|error| panic!("{error:?}"))
    }

    fn aside(dir: &Path) -> usize {
        let files = fs::read_dir(dir).unwrap().flatten();
        files
            .filter(|file| file.file_name().to_string_lossy().contains(".bad-"))
            .count()
    }

    #[test]
    fn what_was_committed_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made/on/the/way");
        let (mut store, memory) = open(&dir);
        assert_eq!(memory.bindings.len(), 0);
        for n in 1..=3 {
            put(&mut store, n, true);
        }
        put(&mut store, 2, false);
        drop(store);
        let (_store, memory) = open(&dir);
        let rows = memory.bindings.into_iter();
        let found: Vec<_> = rows.map(|row| row.saved(1, &now())).collect();
        assert_eq!(found, [saved(1), saved(3)]);
        assert_eq!(aside(&dir), 0);
    }

    #[test]
    fn a_file_of_the_version_before_is_read_and_brought_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        put(&mut store, 1, true);
        drop(store);
        let path = dir.path().join(FILE);
        {
            let db = Database::create(&path).unwrap();
            let transaction = db.begin_write().unwrap();
            transaction.delete_table(ALARMS).unwrap();
            {
                let mut meta = transaction.open_table(META).unwrap();
                meta.insert("format", OLDEST).unwrap();
                let mut bindings = transaction.open_table(BINDINGS).unwrap();
                let key = BindingRow::key("br0", saved(1).key);
                let row = bindings
                    .remove(key.as_str())
                    .unwrap()
                    .unwrap()
                    .value()
                    .to_vec();
                let mut row: serde_json::Value = serde_json::from_slice(&row).unwrap();
                let later = row.as_object_mut().unwrap().remove("released");
                assert!(later.is_some());
                let row = serde_json::to_vec(&row).unwrap();
                bindings.insert(key.as_str(), row.as_slice()).unwrap();
            }
            transaction.commit().unwrap();
        }
        let (store, memory) = open(dir.path());
        let rows = memory.bindings.into_iter();
        let found: Vec<_> = rows.map(|row| row.saved(1, &now())).collect();
        assert_eq!((found, memory.alarms), (vec![saved(1)], vec![]));
        assert_eq!(store.format().ok(), Some((Some(FORMAT), false)));
        assert_eq!(aside(dir.path()), 0);
    }

    #[test]
    fn two_cannot_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let (_first, _) = open(dir.path());
        let Err(error) = Store::open(dir.path(), Timestamp::UNIX_EPOCH) else {
            panic!("opened twice")
        };
        assert!(error.to_string().contains("another agent"), "{error}");
        assert_eq!(aside(dir.path()), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_named() {
        let Err(error) = Store::open(Path::new("/proc/nowhere"), Timestamp::UNIX_EPOCH) else {
            panic!("made a folder in /proc")
        };
        assert_eq!(error.to_string(), "cannot use /proc/nowhere");
    }

    #[test]
    fn foreign_and_newer_files_are_set_aside() {
        let foreign = |path: &Path| {
            let db = Database::create(path).unwrap();
            let transaction = db.begin_write().unwrap();
            transaction.open_table(BINDINGS).unwrap();
            transaction.commit().unwrap();
        };
        let newer = |path: &Path| {
            drop(open(path.parent().unwrap()));
            let db = Database::create(path).unwrap();
            let transaction = db.begin_write().unwrap();
            transaction
                .open_table(META)
                .unwrap()
                .insert("format", FORMAT + 1)
                .unwrap();
            transaction.commit().unwrap();
        };
        let text = |path: &Path| fs::write(path, "[bindings]\n".repeat(1000)).unwrap();
        let makers: [&dyn Fn(&Path); 3] = [&foreign, &newer, &text];
        for make in makers {
            let dir = tempfile::tempdir().unwrap();
            make(&dir.path().join(FILE));
            let (mut store, memory) = open(dir.path());
            assert_eq!((memory.bindings.len(), aside(dir.path())), (0, 1));
            put(&mut store, 1, true);
            drop(store);
            assert_eq!(open(dir.path()).1.bindings.len(), 1);
        }
    }

    /// Whatever happens to the file, the agent starts: with what was in it, or without.
    #[test]
    fn damage_never_stops_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        for n in 1..=200 {
            put(&mut store, n, true);
        }
        drop(store);
        let good = fs::read(dir.path().join(FILE)).unwrap();
        let mut random: u64 = 42;
        let mut draw = |below: usize| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        let (mut whole, mut set_aside) = (0, 0);
        for round in 0..120 {
            let dir = tempfile::tempdir().unwrap();
            let mut bad = good.clone();
            match round % 4 {
                0 => bad.truncate(draw(good.len())),
                1 => {
                    let at = draw(good.len() - 4096);
                    bad[at..at + 4096].fill(0);
                }
                2 => {
                    for _ in 0..1 + draw(20) {
                        let at = draw(good.len());
                        bad[at] ^= 1 << draw(8);
                    }
                }
                // Where what matters most is.
                _ => {
                    let at = draw(320);
                    bad[at] ^= 1 << draw(8);
                }
            }
            fs::write(dir.path().join(FILE), bad).unwrap();
            let (mut store, memory) = open(dir.path());
            match (memory.bindings.len(), aside(dir.path())) {
                (200, 0) => whole += 1,
                (0, 1) => set_aside += 1,
                // A header that says less: an earlier commit, or an empty file.
                (_, 0) => whole += 1,
                other => panic!("round {round}: {other:?}"),
            }
            put(&mut store, 201, true);
        }
        assert!(set_aside > 40, "{set_aside} set aside, {whole} whole");
    }

    #[test]
    fn an_intent_is_there_until_its_outcome_is_known_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        let entry = |number, outcome| AuditEntry {
            number,
            ts: Timestamp::UNIX_EPOCH,
            ip: Ipv4Addr::new(10, 0, 0, 1),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            client_id: None,
            segment: "br0".to_owned(),
            vlan: 0,
            port: "vm1".to_owned(),
            server: Ipv4Addr::new(10, 0, 0, 254),
            server_mac: None,
            acked: true,
            seen_alive: false,
            lease_expires_at: None,
            port_lost: None,
            silent_since: Timestamp::UNIX_EPOCH,
            silent_for_ms: 2000,
            probes: 3,
            gates: Vec::new(),
            xid: 7,
            verdict: None,
            order: None,
            outcome,
        };
        let put = |store: &mut Store, number, outcome| {
            let mut batch = Batch::default();
            batch.intent(&entry(number, outcome));
            store.commit(&batch).unwrap();
        };
        for _ in 0..3 {
            let number = store.next_intent();
            put(&mut store, number, AuditOutcome::Intended);
        }
        put(&mut store, 1, AuditOutcome::Sent);
        drop(store);
        let (mut store, memory) = open(dir.path());
        let open_ones = [0, 2].map(|number| entry(number, AuditOutcome::Intended));
        assert_eq!(memory.intents, open_ones);
        for number in [0, 2] {
            put(&mut store, number, AuditOutcome::Unknown);
        }
        drop(store);
        let (mut store, memory) = open(dir.path());
        assert_eq!((memory.intents, store.next_intent()), (vec![], 3));
    }

    /// `cargo test --release -- --ignored --nocapture what_a_commit_costs`, with TMPDIR on a disk.
    #[test]
    #[ignore = "a measurement"]
    #[expect(clippy::disallowed_methods, reason = "it measures")]
    fn what_a_commit_costs() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        for rows in [1_u8, 10, 250] {
            let begin = std::time::Instant::now();
            for _ in 0..100 {
                let mut batch = Batch::default();
                for n in 0..rows {
                    let row = BindingRow::new("br0", saved(n), &now());
                    batch.binding(BindingRow::key("br0", saved(n).key), Some(&row));
                }
                store.commit(&batch).unwrap();
            }
            let each = begin.elapsed() / 100;
            println!(
                "a commit of {rows} bindings: {each:?}, {:?} each",
                each / rows.into()
            );
        }
    }
}
