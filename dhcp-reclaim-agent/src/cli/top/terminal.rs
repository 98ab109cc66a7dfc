//! The terminal: ours for a while, and as it was afterwards, however we end.

use std::io::{self, IsTerminal};

use anyhow::{Context, ensure};
use ratatui::DefaultTerminal;

/// Gives the terminal back when it is dropped; a panic does so too, before it is told.
#[derive(Debug)]
pub struct Screen {
    pub terminal: DefaultTerminal,
}

impl Screen {
    pub fn open() -> anyhow::Result<Self> {
        ensure!(
            io::stdin().is_terminal() && io::stdout().is_terminal(),
            "top needs a terminal; `list`, `stats` and `events` do not"
        );
        // Its panic hook restores the terminal, and then calls the one that was there.
        let terminal = ratatui::try_init().context("cannot take the terminal")?;
        Ok(Self { terminal })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _gone = ratatui::try_restore();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Read as _,
        os::fd::{AsFd as _, OwnedFd},
        process::{Command, Stdio},
    };

    use nix::{pty::openpty, sys::termios::tcgetattr};

    use super::*;

    /// Not a test: the process in a terminal that [`a_panic_gives_the_terminal_back`] starts.
    #[test]
    #[ignore = "panics on purpose"]
    fn panics_with_the_screen_open() {
        let _screen = Screen::open().unwrap();
        panic!("on purpose");
    }

    #[test]
    fn a_panic_gives_the_terminal_back() {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let end = |fd: &OwnedFd| Stdio::from(fd.as_fd().try_clone_to_owned().unwrap());
        let path = module_path!().split_once("::").unwrap().1;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([&format!("{path}::panics_with_the_screen_open"), "--exact"])
            .args(["--ignored", "--nocapture", "--test-threads=1"])
            .env("TERM", "xterm")
            .stdin(end(&pty.slave))
            .stdout(end(&pty.slave))
            .stderr(end(&pty.slave))
            .spawn()
            .unwrap();
        assert!(!child.wait().unwrap().success());
        let after = tcgetattr(&pty.slave).unwrap();
        assert_eq!(after.local_flags, before.local_flags);
        assert_eq!(after.input_flags, before.input_flags);
        drop(pty.slave);
        // All of it fits the terminal's buffer; reading ends with an error once nobody has the slave.
        let mut said = Vec::new();
        let _ended = File::from(pty.master).read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        let at = |part: &str| {
            said.find(part)
                .unwrap_or_else(|| panic!("no {part:?} in {said:?}"))
        };
        assert!(at("\u{1b}[?1049h") < at("\u{1b}[?1049l"));
        assert!(
            at("\u{1b}[?1049l") < at("on purpose"),
            "told where it stays: {said:?}"
        );
    }
}
