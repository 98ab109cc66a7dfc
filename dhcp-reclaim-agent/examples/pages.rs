//! Writes man pages and completions of the command line into a folder: for packages.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap_complete::{Shell, generate_to};
use dhcp_reclaim_agent::cli::command;

fn main() -> Result<()> {
    let to = env::args_os().nth(1).context("which folder?")?;
    let to = PathBuf::from(to);
    fs::create_dir_all(&to)?;
    clap_mangen::generate_to(command(), &to)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command(), "dhcp-reclaim", &to)?;
    }
    Ok(())
}
