//! A foreign program of the lab: its output in a file, its end with its owner.
use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::watch::{tail, until};

#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in `dir`/`name`.log.
    pub fn spawn(dir: &Path, name: &str, command: &mut Command) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Waits until the log shows one of `signs`.
    pub fn wait_log(&mut self, signs: &[&str], timeout: Duration) -> Result<()> {
        let dir = self.log.with_file_name("");
        let what = format!("{} says {signs:?}", self.name);
        until(&dir, timeout, &what, || {
            let log = self.log();
            if signs.iter().any(|sign| log.contains(sign)) {
                return Ok(Some(()));
            }
            self.check_alive()?;
            Ok(None)
        })
        .with_context(|| tail(&self.log(), 15))
    }

    /// Waits until the log shows `sign` so many times: it goes on where another process of the name ended.
    pub fn wait_log_nth(&mut self, sign: &str, times: usize, timeout: Duration) -> Result<()> {
        let dir = self.log.with_file_name("");
        let what = format!("{} says {sign:?} {times} times", self.name);
        until(&dir, timeout, &what, || {
            self.check_alive()?;
            Ok((self.log().matches(sign).count() >= times).then_some(()))
        })
    }

    /// An error, with the log's tail, once the process has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended ({status}):\n{}", self.name, tail(&self.log(), 15));
        }
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Waits for the process to end by itself.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let dir = self.log.with_file_name("");
        until(&dir, timeout, &what, || Ok(self.child.try_wait()?))
            .with_context(|| tail(&self.log(), 15))
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self, timeout: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        self.wait_end(timeout)
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> ExitStatus {
        // It fails if the process has ended, which is what is wanted.
        let _ = self.child.kill();
        self.child
            .wait()
            .unwrap_or_else(|_| ExitStatus::from_raw(9))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
