//! What a service manager is told (sd_notify(3)): ready, reloading, stopping, and still at work.
//!
//! Not the crate sd-notify: its sockets block, and the loop must not wait for a service manager that
//! does not read. What such a one is to know is kept, and said when it reads again: a start or a
//! reload that is not told of fails in the manager's eyes.

#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    env,
    ffi::OsStr,
    io::{self, ErrorKind},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    process,
    time::Duration,
};

use tracing::{debug, warn};

use crate::core::Time;

/// Nobody, unless `NOTIFY_SOCKET` says who.
#[derive(Debug, Default)]
pub struct Service {
    socket: Option<UnixDatagram>,
    watchdog: Option<Watchdog>,
    /// Not sent yet, in its order: the manager's queue is full.
    unsent: VecDeque<String>,
}

/// More than that of them and the oldest is forgotten: where it was a READY, a later one says the same.
const UNSENT_MAX: usize = 16;
/// How long the end waits for a manager that does not read.
const LAST_WORDS: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Watchdog {
    interval: Duration,
    due: Time,
}

impl Service {
    /// Who started us, as the environment tells.
    pub fn from_env() -> Self {
        let Some(path) = env::var_os("NOTIFY_SOCKET") else {
            return Self::default();
        };
        match connect(&path) {
            Ok(socket) => Self {
                socket: Some(socket),
                watchdog: watchdog(|name| env::var(name).ok(), process::id()),
                unsent: VecDeque::new(),
            },
            Err(error) => {
                let path = path.to_string_lossy();
                warn!(%error, %path, "the service manager cannot be told anything");
                Self::default()
            }
        }
    }

    pub fn ready(&mut self, status: &str) {
        self.tell(format!("READY=1\nSTATUS={status}"));
    }

    pub fn status(&mut self, status: &str) {
        self.tell(format!("STATUS={status}"));
    }

    /// To be followed by [`Self::ready`].
    pub fn reloading(&mut self, now: Time) {
        let micros = now.as_nanos() / 1000;
        self.tell(format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    pub fn stopping(&mut self) {
        // Whoever stops is neither ready nor reloading.
        self.unsent.clear();
        self.tell("STOPPING=1".to_owned());
    }

    /// The last of all: nothing is left to do but to wait, for a second at most, until the manager reads.
    pub fn finish(mut self) {
        if self.unsent.is_empty() {
            return;
        }
        if let Some(socket) = &self.socket {
            let waits = socket
                .set_write_timeout(Some(LAST_WORDS))
                .and_then(|()| socket.set_nonblocking(false));
            if let Err(error) = waits {
                debug!(%error, "the service manager is not waited for");
            }
        }
        self.flush();
        if !self.unsent.is_empty() {
            warn!("the service manager does not read: it was not told of the end");
        }
    }

    /// The loop goes round: to be called at each turn.
    pub fn alive(&mut self, now: Time) {
        self.flush();
        let Some(watchdog) = &mut self.watchdog else {
            return;
        };
        if now < watchdog.due {
            return;
        }
        watchdog.due = now + watchdog.interval;
        // Not kept: the next one says as much.
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(b"WATCHDOG=1")
        {
            debug!(%error, "the watchdog was not patted");
        }
    }

    fn tell(&mut self, state: String) {
        if self.socket.is_none() {
            return;
        }
        let is_status = |state: &String| state.starts_with("STATUS=");
        if is_status(&state) && self.unsent.back().is_some_and(is_status) {
            self.unsent.pop_back();
        }
        self.unsent.push_back(state);
        self.flush();
        if self.unsent.len() > UNSENT_MAX {
            let state = self.unsent.pop_front();
            warn!(state, "the service manager does not read: it was not told");
        }
    }

    fn flush(&mut self) {
        while let (Some(socket), Some(state)) = (&self.socket, self.unsent.front()) {
            let Err(error) = socket.send(state.as_bytes()) else {
                self.unsent.pop_front();
                continue;
            };
            match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => return,
                // Another socket in its place is not the one that this is connected to.
                ErrorKind::ConnectionRefused | ErrorKind::NotConnected => {
                    warn!(%error, "the service manager is gone: it is told nothing any more");
                    self.socket = None;
                    self.unsent.clear();
                }
                _ => {
                    warn!(%error, state, "the service manager was not told");
                    self.unsent.pop_front();
                }
            }
        }
    }
}

/// A path, or the name of an abstract socket after an `@`.
fn connect(path: &OsStr) -> io::Result<UnixDatagram> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// sd_watchdog_enabled(3): petted three times before it bites, so that one that is lost is none.
fn watchdog(env: impl Fn(&str) -> Option<String>, pid: u32) -> Option<Watchdog> {
    let micros: u64 = env("WATCHDOG_USEC")?.parse().ok()?;
    let ours = env("WATCHDOG_PID").is_none_or(|of| of.parse() == Ok(pid));
    (ours && micros > 0).then(|| Watchdog {
        interval: Duration::from_micros(micros / 3),
        due: Time::ZERO,
    })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn at(secs: u64) -> Time {
        Time::ZERO + Duration::from_secs(secs)
    }

    fn told(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        match socket.recv(&mut buffer) {
            Ok(length) => String::from_utf8_lossy(&buffer[..length]).into_owned(),
            Err(_) => "nothing".to_owned(),
        }
    }

    #[test]
    fn the_manager_hears_each_step_and_the_watchdog_no_more_than_it_needs() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let wanted = |name: &str| (name == "WATCHDOG_USEC").then(|| "30000000".to_owned());
        let mut service = Service {
            socket: Some(ours),
            watchdog: watchdog(wanted, 7),
            ..Service::default()
        };
        service.ready("1 port");
        assert_eq!(told(&theirs), "READY=1\nSTATUS=1 port");
        service.reloading(at(2));
        assert_eq!(told(&theirs), "RELOADING=1\nMONOTONIC_USEC=2000000");
        for (now, expected) in [(100, "WATCHDOG=1"), (109, "nothing"), (110, "WATCHDOG=1")] {
            service.alive(at(now));
            assert_eq!(told(&theirs), expected, "at {now} s");
        }
        service.stopping();
        assert_eq!(told(&theirs), "STOPPING=1");
    }

    #[test]
    fn a_manager_that_does_not_read_holds_nothing_up_and_hears_the_newest_when_it_does() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).unwrap();
        }
        while ours.send(b"WATCHDOG=1").is_ok() {}
        let mut service = Service {
            socket: Some(ours),
            ..Service::default()
        };
        for number in 0..10_000 {
            service.reloading(at(number));
        }
        service.ready("0 ports");
        while told(&theirs) == "WATCHDOG=1" {}
        service.alive(at(1));
        let mut heard = Vec::new();
        loop {
            match told(&theirs) {
                nothing if nothing == "nothing" => break,
                told => heard.push(told),
            }
            service.alive(at(1));
        }
        assert_eq!(heard.len(), UNSENT_MAX, "{heard:?}");
        let [.., reloading, ready] = &heard[..] else {
            panic!("{heard:?}");
        };
        assert_eq!(reloading, "RELOADING=1\nMONOTONIC_USEC=9999000000");
        assert_eq!(ready, "READY=1\nSTATUS=0 ports");
    }

    /// A manager whose queue is full, and its end of the socket.
    fn late() -> (Service, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        while ours.send(b"WATCHDOG=1").is_ok() {}
        let service = Service {
            socket: Some(ours),
            ..Service::default()
        };
        (service, theirs)
    }

    #[test]
    fn the_end_waits_for_a_manager_that_is_late() {
        let (mut service, theirs) = late();
        service.ready("1 port");
        service.stopping();
        assert_eq!(service.unsent, ["STOPPING=1"]);
        let finished = thread::spawn(move || service.finish());
        let mut said = told(&theirs);
        while said == "WATCHDOG=1" {
            said = told(&theirs);
        }
        assert_eq!(said, "STOPPING=1");
        finished.join().unwrap();
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let (mut service, theirs) = late();
        service.stopping();
        service.finish();
        theirs.set_nonblocking(true).unwrap();
        while told(&theirs) == "WATCHDOG=1" {}
        assert_eq!(told(&theirs), "nothing");
    }

    #[test]
    fn of_what_is_only_shown_the_newest_is_kept() {
        let (mut service, _theirs) = late();
        service.ready("0 ports");
        for number in 0..100 {
            service.status(&format!("{number} ports"));
        }
        assert_eq!(
            service.unsent,
            ["READY=1\nSTATUS=0 ports", "STATUS=99 ports"]
        );
    }

    #[test]
    fn a_manager_that_is_gone_is_told_nothing_and_what_it_cannot_take_holds_nothing_up() {
        let (mut service, theirs) = late();
        service.ready("1 port");
        assert_eq!(service.unsent.len(), 1);
        drop(theirs);
        service.ready("2 ports");
        assert!(service.socket.is_none() && service.unsent.is_empty());
        service.stopping();
        service.finish();

        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut service = Service {
            socket: Some(ours),
            ..Service::default()
        };
        service.status(&"x".repeat(10_000_000));
        service.ready("1 port");
        assert_eq!(told(&theirs), "READY=1\nSTATUS=1 port");
    }

    #[test]
    fn a_watchdog_of_another_process_is_not_ours() {
        let env = |pid: &'static str| {
            move |name: &str| match name {
                "WATCHDOG_USEC" => Some("3000000".to_owned()),
                "WATCHDOG_PID" => Some(pid.to_owned()),
                _ => None,
            }
        };
        assert!(watchdog(env("7"), 8).is_none());
        let ours = watchdog(env("7"), 7).map(|watchdog| watchdog.interval);
        assert_eq!(ours, Some(Duration::from_secs(1)));
        assert!(watchdog(|_| None, 7).is_none());
    }

    #[test]
    fn an_abstract_socket_is_found_by_its_name() {
        let name = format!("dhcp-reclaim-test-{}", process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let theirs = UnixDatagram::bind_addr(&address).unwrap();
        let ours = connect(OsStr::new(&format!("@{name}"))).unwrap();
        ours.send(b"READY=1").unwrap();
        assert_eq!(told(&theirs), "READY=1");
        assert!(connect(OsStr::new("/nonexistent/notify")).is_err());
    }
}
