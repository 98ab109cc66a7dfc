//! `run`: the agent itself.

use std::path::PathBuf;

use clap::ValueEnum;

use super::{log, say};
use crate::config::{Options, Settings, Source};

/// Run the agent: learn leases, watch VMs, release what the dead leave behind
///
/// Flags win over the file of --config, which wins over the defaults. In the file, keys are named as
/// the flags are: `hold-down = "2s"`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// TOML file with settings
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Only say whether the settings can be used, by the exit code too
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub options: Options,
    /// What to log [default: RUST_LOG, or info]
    #[arg(long, value_name = "LEVEL", help_heading = "Logging")]
    pub log_level: Option<LogLevel>,
    /// How to log, on stderr; the journal is told priorities, too
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "text",
        help_heading = "Logging"
    )]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

pub fn main(args: Args, agent: fn(Settings, Source) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let source = Source {
        flags: args.options,
        file: args.config,
    };
    let settings = source.load()?;
    if args.check {
        return say("the settings can be used");
    }
    log::start(args.log_level, args.log_format)?;
    agent(settings, source)
}

impl LogLevel {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}
