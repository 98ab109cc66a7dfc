//! The binary: see `cli`.
use std::process::ExitCode;

use dhcp_reclaim_agent::{agent, cli};

fn main() -> ExitCode {
    cli::main(agent::run)
}
