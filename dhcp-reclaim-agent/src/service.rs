//! What a service manager is told (sd_notify(3)): ready, reloading, stopping, and still at work.
//!
//! Not the crate sd-notify: its sockets block, and the loop must not wait for a service manager that
//! does not read.

#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsStr,
    io,
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
}

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
            },
            Err(error) => {
                let path = path.to_string_lossy();
                warn!(%error, %path, "the service manager cannot be told anything");
                Self::default()
            }
        }
    }

    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={status}"));
    }

    pub fn status(&self, status: &str) {
        self.tell(&format!("STATUS={status}"));
    }

    /// To be followed by [`Self::ready`].
    pub fn reloading(&self, now: Time) {
        let micros = now.as_nanos() / 1000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// The loop goes round: to be called at each turn.
    pub fn alive(&mut self, now: Time) {
        let Some(watchdog) = &mut self.watchdog else {
            return;
        };
        if now < watchdog.due {
            return;
        }
        watchdog.due = now + watchdog.interval;
        self.tell("WATCHDOG=1");
    }

    fn tell(&self, state: &str) {
        let Some(socket) = &self.socket else {
            return;
        };
        if let Err(error) = socket.send(state.as_bytes()) {
            debug!(%error, state, "the service manager was not told");
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
    fn a_manager_that_does_not_read_holds_nothing_up() {
        let (ours, _theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let service = Service {
            socket: Some(ours),
            watchdog: None,
        };
        for _ in 0..10_000 {
            service.stopping();
        }
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
