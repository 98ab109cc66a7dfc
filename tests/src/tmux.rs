//! A terminal that a test looks at and types into.
use std::{
    ffi::OsStr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    sandbox::{DIR, foreign, run},
    watch::until,
};

/// What the shell in it says before it reads a command, after how the last one ended.
const PROMPT: &str = "READY>";

/// A tmux session with one window and a shell; it ends with this.
pub struct Terminal {
    tmux: std::path::PathBuf,
    socket: std::path::PathBuf,
    name: String,
}

impl Terminal {
    pub fn open(name: &str, columns: u16, rows: u16) -> Result<Self> {
        let dir = Path::new(DIR).join(name);
        std::fs::create_dir_all(&dir)?;
        let terminal = Self {
            tmux: foreign("tmux")?,
            socket: dir.join("socket"),
            name: name.to_owned(),
        };
        let (columns, rows) = (columns.to_string(), rows.to_string());
        run(terminal
            .command()
            .args(["new-session", "-d", "-x", &columns, "-y", &rows])
            .args(["/usr/bin/env", &format!("PS1=[$?] {PROMPT} "), "/bin/sh"]))?;
        // Whatever is drawn wakes whoever waits for it.
        let log = format!("exec cat >>{}", dir.join("output").display());
        run(terminal.command().args(["pipe-pane", "-o", &log]))?;
        terminal.wait("a prompt", Duration::from_secs(10), |screen| {
            screen.contains(PROMPT)
        })?;
        Ok(terminal)
    }

    /// Types keys, as tmux names them: `Enter`, `C-c`, `Down`.
    pub fn keys(&self, keys: &[&str]) -> Result<()> {
        run(self.command().arg("send-keys").args(keys)).map(drop)
    }

    pub fn text(&self, text: &str) -> Result<()> {
        run(self.command().args(["send-keys", "-l", text])).map(drop)
    }

    /// Types a command line.
    pub fn line(&self, line: &str) -> Result<()> {
        self.text(line)?;
        self.keys(&["Enter"])
    }

    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        run(self
            .command()
            .args(["resize-window", "-x", &columns, "-y", &rows]))
        .map(drop)
    }

    /// What it shows, a line for each row.
    pub fn screen(&self) -> Result<String> {
        run(self.command().args(["capture-pane", "-p"]))
    }

    pub fn wait(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let dir = Path::new(DIR).join(&self.name);
        let mut screen = String::new();
        until(&dir, timeout, what, || {
            screen = self.screen()?;
            Ok(wanted(&screen).then(|| screen.clone()))
        })
        .with_context(|| format!("the screen:\n{screen}"))
    }

    /// Waits until all of these are shown.
    pub fn wait_text(&self, parts: &[&str]) -> Result<String> {
        self.wait(&format!("{parts:?}"), Duration::from_secs(20), |screen| {
            parts.iter().all(|part| screen.contains(part))
        })
    }

    /// Waits until a command has ended so.
    pub fn wait_end(&self, code: i32) -> Result<String> {
        self.wait_text(&[&format!("[{code}] {PROMPT}")])
    }

    /// The terminal's settings, as the shell sees them.
    pub fn settings(&self) -> Result<String> {
        let file = Path::new(DIR).join(&self.name).join("settings");
        self.line(&format!(
            "clear; stty -a >{0}.new; mv {0}.new {0}",
            file.display()
        ))?;
        let dir = file.with_file_name("");
        let settings = until(&dir, Duration::from_secs(10), "stty", || {
            Ok(std::fs::read_to_string(&file).ok())
        })?;
        std::fs::remove_file(&file)?;
        self.wait_text(&[PROMPT])?;
        Ok(settings)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.tmux);
        command
            .args([OsStr::new("-u"), OsStr::new("-f"), OsStr::new("/dev/null")])
            .arg("-S")
            .arg(&self.socket)
            .env("LC_ALL", "C.UTF-8")
            .env_remove("TMUX")
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The sandbox ends whatever is left.
        let _ = self.command().arg("kill-server").output();
    }
}
