//! Shorter waits while programs are attached.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
};

use tracing::warn;

const KNOB: &str = "/sys/kernel/rcu_expedited";

/// Has the kernel hurry while a program is attached: it puts a tcx program in place, and then waits for
/// an RCU grace period (some 14 ms) while it holds the lock of all links. Expedited, that takes a tenth
/// of a millisecond, and interrupts every busy processor once.
#[derive(Debug, Default)]
pub struct Expedite {
    /// `None`: it is not to be touched.
    knob: Option<File>,
}

impl Expedite {
    /// Opens the knob, for as long as the process may. One that somebody else has set stays set.
    ///
    /// # Errors
    ///
    /// If it cannot be opened, or read.
    pub fn open() -> io::Result<Self> {
        let knob = OpenOptions::new().read(true).write(true).open(KNOB)?;
        let mut value = [0; 1];
        knob.read_exact_at(&mut value, 0)?;
        let is_off = value == *b"0";
        Ok(Self {
            knob: is_off.then_some(knob),
        })
    }

    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        self.set(b"1");
        let done = work();
        self.set(b"0");
        done
    }

    fn set(&self, value: &[u8; 1]) {
        if let Some(knob) = &self.knob
            && let Err(error) = knob.write_all_at(value, 0)
        {
            warn!(%error, "cannot write {KNOB}");
        }
    }
}
