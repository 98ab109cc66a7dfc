//! What the repository keeps for hostile bytes: fuzzers' corpora, and captures of real clients.
use std::{fs, path::Path};

use anyhow::{Context as _, Result};

/// From where cargo runs tests: a test binary may be on another machine than it was built on.
pub const CAPTURES: &str = "fixtures/captures";
const CORPUS: &str = "fuzz/corpus";

/// The entries of a target's corpus by name, which is what a failure is told by.
pub fn entries(target: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let dir = Path::new(CORPUS).join(target);
    let files = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut entries = Vec::new();
    for file in files {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        entries.push((format!("{target}/{name}"), fs::read(&path)?));
    }
    entries.sort();
    Ok(entries)
}
