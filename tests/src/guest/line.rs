//! Lines to a running qemu: its monitor, and a serial port of its guest.
use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{clock::Deadline, process::Process, watch::until};

/// Text both ways, kept as lines from its beginning on.
pub struct Line {
    name: &'static str,
    stream: UnixStream,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Default)]
struct Heard {
    lines: Vec<String>,
    ended: bool,
}

/// qemu makes its sockets before anything else.
const CONNECTS: Duration = Duration::from_secs(30);

impl Line {
    /// Connects to a socket that `qemu` listens at, or soon will.
    pub fn connect(name: &'static str, socket: &Path, qemu: &mut Process) -> Result<Self> {
        let dir = socket.parent().context("a socket in a folder")?;
        let stream = until(dir, CONNECTS, &format!("qemu's {name}"), || {
            qemu.check_alive()?;
            Ok(UnixStream::connect(socket).ok())
        })?;
        let reader = BufReader::new(stream.try_clone()?);
        let shared = Arc::<Shared>::default();
        // It ends with the socket: with qemu, or with us.
        std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for line in reader.split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    shared.lock().lines.push(line);
                    shared.more.notify_all();
                }
                shared.lock().ended = true;
                shared.more.notify_all();
            }
        });
        Ok(Self {
            name,
            stream,
            shared,
        })
    }

    pub fn send(&self, line: &str) -> Result<()> {
        (&self.stream)
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("cannot write to qemu's {}", self.name))
    }

    /// How many lines were heard so far.
    pub fn heard(&self) -> usize {
        self.shared.lock().lines.len()
    }

    /// The latest line that means something, as `look` has it.
    pub fn last<T>(&self, look: impl Fn(&str) -> Option<T>) -> Option<T> {
        let heard = self.shared.lock();
        heard.lines.iter().rev().find_map(|line| look(line))
    }

    /// Waits for a line after the first `from` ones that means something.
    pub fn wait<T>(
        &self,
        from: usize,
        what: &str,
        timeout: Duration,
        look: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Deadline::after(timeout);
        let mut heard = self.shared.lock();
        loop {
            let since = heard.lines.get(from..).unwrap_or_default();
            if let Some(found) = since.iter().find_map(|line| look(line)) {
                return Ok(found);
            }
            if heard.ended || deadline.passed() {
                let why = match heard.ended {
                    true => "qemu has ended".to_owned(),
                    false => format!("not within {timeout:?}"),
                };
                bail!(
                    "{what}: {why}; its {} said:\n{}",
                    self.name,
                    since.join("\n")
                );
            }
            let waited = self.shared.more.wait_timeout(heard, deadline.left());
            heard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Whoever reads must see an end; qemu may have made one already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// qemu's monitor, spoken to in JSON (QMP).
pub struct Monitor {
    line: Line,
    commands: AtomicU64,
}

/// What qemu answers at once, even on a machine that is busy.
const ANSWERS: Duration = Duration::from_secs(30);

impl Monitor {
    pub fn connect(socket: &Path, qemu: &mut Process) -> Result<Self> {
        let line = Line::connect("monitor", socket, qemu)?;
        line.wait(0, "a greeting", ANSWERS, |line| {
            parse(line)?.get("QMP").is_some().then_some(())
        })?;
        let this = Self {
            line,
            commands: AtomicU64::new(0),
        };
        this.execute("qmp_capabilities", &json!({}))?;
        Ok(this)
    }

    /// Runs a command of QMP and returns what it returns.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value> {
        let id = self.commands.fetch_add(1, Ordering::Relaxed);
        let from = self.line.heard();
        let words = json!({"execute": command, "arguments": arguments, "id": id});
        self.line.send(&words.to_string())?;
        let answer = self.line.wait(from, command, ANSWERS, |line| {
            parse(line).filter(|answer| answer["id"] == id)
        })?;
        ensure!(answer.get("error").is_none(), "{command}: {answer}");
        Ok(answer["return"].clone())
    }

    /// A place in time, to wait for events from.
    pub fn heard(&self) -> usize {
        self.line.heard()
    }

    /// Waits for an event after `from` whose data satisfy `wanted`.
    pub fn wait_event(
        &self,
        from: usize,
        event: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        self.line.wait(from, event, timeout, |line| {
            let told = parse(line)?;
            (told["event"] == event && wanted(&told["data"])).then_some(())
        })
    }
}

fn parse(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok()
}
