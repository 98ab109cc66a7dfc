//! `run`: the agent itself.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
};

use anyhow::Context;
use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use crate::config::{Options, Settings};

/// Run the agent: learn leases, watch VMs, release what the dead leave behind
///
/// Flags win over the file of --config, which wins over the defaults. In the file, keys are named as
/// the flags are: `hold-down = "2s"`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// TOML file with settings
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub options: Options,
    /// What to log [default: RUST_LOG, or info]
    #[arg(long, value_name = "LEVEL", help_heading = "Logging")]
    pub log_level: Option<LogLevel>,
    /// How to log, on stderr
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

pub fn main(args: Args, agent: fn(Settings) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let settings = Settings::load(args.options, args.config.as_deref())?;
    start_logging(args.log_level, args.log_format)?;
    agent(settings)
}

fn start_logging(level: Option<LogLevel>, format: LogFormat) -> anyhow::Result<()> {
    let filter = match level {
        Some(level) => EnvFilter::new(level.name()),
        None => match std::env::var("RUST_LOG") {
            Ok(directives) if !directives.is_empty() => {
                EnvFilter::try_new(directives).context("RUST_LOG is not a log filter")?
            }
            Ok(_) | Err(_) => EnvFilter::new(LogLevel::Info.name()),
        },
    };
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => logging.try_init(),
        LogFormat::Json => logging.json().flatten_event(true).try_init(),
    }
    .map_err(|error| anyhow::anyhow!(error))
    .context("cannot start logging")
}

impl LogLevel {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}
