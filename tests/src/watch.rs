//! Waiting for foreign programs' files: woken by inotify, bounded by a deadline.
use std::{fs, os::fd::AsFd as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use crate::clock::Deadline;

/// How long at most until something that inotify cannot tell (a process's end, a socket that
/// listens) is looked at again.
const TICK: Duration = Duration::from_millis(20);

/// Calls `look` whenever a file in `dir` changes, until it has an answer.
pub fn until<T>(
    dir: &Path,
    timeout: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Deadline::after(timeout);
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .context("cannot watch files")?;
    fs::create_dir_all(dir)?;
    let changes = AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_CLOSE_WRITE;
    inotify
        .add_watch(dir, changes)
        .with_context(|| format!("cannot watch {}", dir.display()))?;
    loop {
        if let Some(answer) = look()? {
            return Ok(answer);
        }
        if deadline.passed() {
            bail!("{what}: not within {timeout:?}");
        }
        let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        let left = deadline.left().min(TICK);
        // Interrupted or timed out: look again either way.
        let _ = poll(
            &mut fds,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
        );
        while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}

/// The last lines of a text, for an error message.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
