//! The rooms that need nothing of the agent, as a package of their own: it builds in seconds, where
//! the agent and its kernel half take minutes.
use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::cargo::root;

/// Rooms that a package is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rooms {
    Core,
    CoreAndPacket,
}

/// Makes the package anew in `dir`, but for what was built there.
pub fn package(dir: &Path, rooms: Rooms) -> Result<PathBuf> {
    let source = dir.join("src");
    if source.exists() {
        fs::remove_dir_all(&source)?;
    }
    let agent = root().join("dhcp-reclaim-agent/src");
    copy(&agent.join("core"), &source.join("core"))?;
    let mut manifest = MANIFEST.to_owned();
    let mut lib = "pub mod core;\n".to_owned();
    if rooms == Rooms::CoreAndPacket {
        copy(&agent.join("packet"), &source.join("packet"))?;
        manifest.push_str(OF_PACKET);
        lib.push_str("pub mod packet;\n");
    }
    fs::write(source.join("lib.rs"), lib)?;
    fs::write(dir.join("Cargo.toml"), manifest)?;
    fs::copy(root().join("Cargo.lock"), dir.join("Cargo.lock"))?;
    Ok(source)
}

const MANIFEST: &str = r#"[workspace]

[package]
name = "dhcp-reclaim-pure"
version = "0.0.0"
edition = "2024"

[profile.test]
debug = 0

[dependencies]
serde = { version = "1", features = ["derive"] }
thiserror = "2"
"#;

const OF_PACKET: &str = r#"dhcproto = "0.15.0"
etherparse = "0.21"

[dev-dependencies]
proptest = { version = "1", default-features = false, features = ["std"] }
"#;

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
