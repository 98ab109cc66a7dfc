//! The frames that mutants are made of, and how many of those are looked at.

use std::path::Path;

use dhcp_reclaim_ebpf::wire::{Tag, vectors};
use dhcp_reclaim_tests::{
    corpus::{self, CAPTURES},
    pcap,
};

/// Every vector, every entry of the classifier's corpus, and every captured frame, by name.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds: Vec<_> = vectors::all()
        .into_iter()
        .filter(|vector| vector.tag == Tag::NONE)
        .map(|vector| (vector.name.to_owned(), vector.frame))
        .collect();
    seeds.extend(corpus::entries("classifier").unwrap_or_else(|error| panic!("{error:#}")));
    for file in std::fs::read_dir(CAPTURES).unwrap() {
        let path = file.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "pcap")
        {
            seeds.extend(frames(&path));
        }
    }
    seeds.sort();
    seeds
}

fn frames(path: &Path) -> impl Iterator<Item = (String, Vec<u8>)> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let frames = pcap::read(path).unwrap_or_else(|error| panic!("{error:#}"));
    let named = move |(number, frame)| (format!("{name}, frame {number}"), frame);
    (1..).zip(frames).map(named)
}

/// As many as the environment says; `cargo xtask fuzz --inputs` does.
pub fn count(default: u64) -> u64 {
    let asked = std::env::var("DHCP_RECLAIM_INPUTS").ok();
    asked.map_or(default, |count| count.parse().unwrap())
}

/// Shows a frame if what is done with it panics.
pub struct Shown<'a>(pub &'a str, pub &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("it was {}: {hex}", self.0);
        }
    }
}
