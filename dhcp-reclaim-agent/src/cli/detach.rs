//! `detach`: what an agent left in the kernel goes.

use std::path::PathBuf;

use super::say;
use crate::{config::DEFAULT_BPFFS, kernel::Kernel};

/// Take away what stopped agents left in the kernel
///
/// A stopped agent leaves its programs on the ports, so that the next one misses nothing. Where there
/// will be no next one, this removes them, and their pins. It fails while an agent is running.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Mount point of the BPF file system
    #[arg(long, value_name = "PATH", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let ports = Kernel::detach_left(&args.bpffs)?;
    say(&match ports.len() {
        0 => "nothing was left".to_owned(),
        1 => "detached from 1 port".to_owned(),
        ports => format!("detached from {ports} ports"),
    })
}
