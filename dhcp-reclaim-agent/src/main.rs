//! The binary: see `cli`.
use std::process::ExitCode;

use dhcp_reclaim_agent::cli;

fn main() -> ExitCode {
    cli::main(|_settings| anyhow::bail!("this build has no agent in it"))
}
