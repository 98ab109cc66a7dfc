//! What the agent gives up once it watches: capabilities, paths and system calls that only a start
//! needs, or that nobody needs. docs/security.md has a sentence for each that stays.

#![forbid(unsafe_code)]

mod capabilities;
mod files;
mod syscalls;

use std::path::PathBuf;

use tracing::{debug, warn};

pub use self::{capabilities::KEPT, syscalls::COMMANDS};

/// What of the sandbox holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// A system call that is not needed ends the agent, a path is refused.
    Enforce,
    /// Such a system call is done, and the kernel's log tells of it; paths are not looked at, since
    /// Landlock has no such mode.
    Log,
}

/// The paths that a running agent uses.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The configuration, to be read again.
    pub config: Option<PathBuf>,
    /// Folders where it keeps files.
    pub state: Vec<PathBuf>,
    /// The control socket, to be removed at the end.
    pub control: PathBuf,
    pub bpffs: PathBuf,
    /// Whether the pins go at the end, and their folder with them.
    pub unpin: bool,
}

/// The sandbox cannot be closed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot drop capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    #[error("cannot give up new privileges")]
    NewPrivileges(#[source] nix::errno::Errno),
    #[error("cannot restrict the file system")]
    Files(#[source] landlock::RulesetError),
    #[error("cannot build the system call filter")]
    Filter(#[source] seccompiler::BackendError),
}

/// Closes the sandbox around the whole process, for good. What this kernel has no means for is left
/// out, with a warning.
pub fn enter(strictness: Strictness, paths: &Paths) -> Result<(), SandboxError> {
    nix::sys::prctl::set_no_new_privs().map_err(SandboxError::NewPrivileges)?;
    capabilities::drop_all_but(&KEPT)?;
    let mut missing = Vec::new();
    match strictness {
        Strictness::Enforce if !files::restrict(paths)? => missing.push("Landlock"),
        Strictness::Enforce => {}
        Strictness::Log => warn!("sandbox: paths are not restricted while it only logs"),
    }
    if let Err(error) = syscalls::restrict(strictness)? {
        debug!(%error, "no system call filter");
        missing.push("seccomp");
    }
    if !missing.is_empty() {
        let missing = missing.join(" and ");
        warn!("sandbox: {missing} cannot be had here; the rest of the sandbox holds");
    }
    Ok(())
}
