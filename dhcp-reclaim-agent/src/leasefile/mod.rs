//! Lease files of DHCP servers: what was granted before anybody listened.
//!
//! Guests have a hand in some fields of such files (names, client-ids), and a file may be old, or be
//! written while it is read. Read here is what is whole; what it is worth, the core decides.

#![forbid(unsafe_code)]

mod parse;
mod spec;

use std::{
    fs::File,
    io::{self, Read as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use jiff::Timestamp;

pub use self::spec::{ImportSpec, Place, PlaceError};
use crate::core::MacAddr;

/// Longer files are no lease files of one node's networks.
const FILE_BYTES: u64 = 16 << 20;

/// Whose file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// dnsmasq's lease file: `EXPIRY MAC IP NAME CLIENT-ID` a line
    Dnsmasq,
    /// Kea's memfile: CSV with a head
    Kea,
    /// libvirt's BRIDGE.status: JSON
    Libvirt,
}

/// A lease as a server keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub ip: Ipv4Addr,
    pub mac: MacAddr,
    pub client_id: Option<Vec<u8>>,
    /// `None` is never.
    pub expires: Option<Timestamp>,
}

/// What is wrong with a file, where, and the mend.
#[derive(Debug, thiserror::Error)]
pub enum LeaseFileError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {problem}; {mend}", path.display())]
    File {
        path: PathBuf,
        problem: String,
        mend: &'static str,
    },
    #[error("{}:{line}: {problem}; {mend}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        problem: String,
        mend: &'static str,
    },
}

/// Reads a file's active IPv4 leases; without a format, its contents tell which it is.
pub fn read(path: &Path, format: Option<Format>) -> Result<(Format, Vec<Lease>), LeaseFileError> {
    let failed = |source| LeaseFileError::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    parse(path, &bytes, format)
}

/// The same with the file's contents; `path` is for errors.
pub fn parse(
    path: &Path,
    bytes: &[u8],
    format: Option<Format>,
) -> Result<(Format, Vec<Lease>), LeaseFileError> {
    let wrong = |problem: String, mend| LeaseFileError::File {
        path: path.to_owned(),
        problem,
        mend,
    };
    if bytes.len() as u64 > FILE_BYTES {
        return Err(wrong(
            format!("longer than {} MiB", FILE_BYTES >> 20),
            "is this a lease file?",
        ));
    }
    // Names may be of any bytes; what is read is ASCII.
    let text = String::from_utf8_lossy(bytes);
    let Some(format) = format.or_else(|| parse::recognise(&text)) else {
        return Err(wrong(
            "neither dnsmasq's, Kea's nor libvirt's leases, as it seems".to_owned(),
            "name its format with --format",
        ));
    };
    let leases = match format {
        Format::Dnsmasq => parse::dnsmasq(&text),
        Format::Kea => parse::kea(&text),
        Format::Libvirt => parse::libvirt(&text),
    };
    leases.map(|leases| (format, leases)).map_err(
        |parse::Wrong {
             line,
             problem,
             mend,
         }| LeaseFileError::Line {
            path: path.to_owned(),
            line,
            problem,
            mend,
        },
    )
}
