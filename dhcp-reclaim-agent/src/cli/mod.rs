//! The command line: one file a subcommand; errors are printed once, here.

#![forbid(unsafe_code)]

mod ask;
mod detach;
mod doctor;
mod events;
mod explain;
mod import;
mod list;
mod log;
mod pause;
mod run;
mod stats;
mod table;
mod terminal;
mod top;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::{
    config::{ConfigError, DEFAULT_CONTROL, Settings, Source},
    control::{Client, ClientError, Request, Response, printable},
};

const AFTER_HELP: &str = "\
Exit codes:
  0  done; `doctor`: nothing fails
  1  an error, or nothing is known of what was asked; `doctor`: something fails
  2  wrong usage or configuration
  3  no agent is running here
  4  no: `probe` found the VM silent, `release` found it alive or a gate that
     holds";

const EXIT_USAGE: u8 = 2;
const EXIT_NO_AGENT: u8 = 3;
const EXIT_NOT_SO: u8 = 4;

/// Gives the DHCP leases of dead VMs back to the server that granted them
#[derive(Debug, Parser)]
// The last of two equal flags counts, so that a script can add to a base.
#[command(name = "dhcp-reclaim", version, after_help = AFTER_HELP, args_override_self = true)]
#[command(
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    // Boxed: by far the largest.
    Run(Box<run::Args>),
    List(list::Args),
    Explain(explain::Args),
    Events(events::Args),
    Stats(stats::Args),
    Import(import::Args),
    Top(top::Args),
    Probe(ask::Args),
    Release(ask::ReleaseArgs),
    Pause(pause::Args),
    Resume(pause::ResumeArgs),
    Detach(detach::Args),
    // Boxed, as it has all settings of `run`.
    Doctor(Box<doctor::Args>),
}

/// Wrong usage that clap cannot know of.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// What every question to the agent takes.
#[derive(Debug, Args)]
struct Query {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The agent's control socket
    #[arg(long, value_name = "PATH", env = "DHCP_RECLAIM_CONTROL", default_value = DEFAULT_CONTROL)]
    control: PathBuf,
}

/// The whole program but for the agent itself, which is `agent`.
pub fn main(agent: fn(Settings, Source) -> anyhow::Result<()>) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and the version come this way too.
            let _closed = error.print();
            return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
        }
    };
    let mut code = ExitCode::SUCCESS;
    let mut with_code = |done: anyhow::Result<ExitCode>| done.map(|done| code = done);
    let done = match cli.command {
        Command::Run(args) => run::main(*args, agent),
        Command::List(args) => quiet_if_closed(list::main(&args)),
        Command::Explain(args) => quiet_if_closed(explain::main(&args)),
        Command::Events(args) => quiet_if_closed(events::main(&args)),
        Command::Stats(args) => quiet_if_closed(stats::main(&args)),
        Command::Import(args) => quiet_if_closed(import::main(&args)),
        Command::Top(args) => top::main(&args),
        Command::Probe(args) => quiet_if_closed(with_code(ask::probe(&args))),
        Command::Release(args) => quiet_if_closed(with_code(ask::release(&args))),
        Command::Pause(args) => quiet_if_closed(pause::main(&args)),
        Command::Resume(args) => quiet_if_closed(pause::resume(&args)),
        Command::Detach(args) => detach::main(&args),
        Command::Doctor(args) => quiet_if_closed(with_code(doctor::main(*args))),
    };
    let Err(error) = done else {
        return code;
    };
    // Nowhere else to say it if stderr is closed.
    let _closed = writeln!(
        io::stderr(),
        "dhcp-reclaim: {}",
        printable(&format!("{error:#}"))
    );
    exit_code(&error)
}

/// The command line itself, for man pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    if matches!(error.downcast_ref(), Some(ClientError::NoAgent(_))) {
        return ExitCode::from(EXIT_NO_AGENT);
    }
    if error.is::<ConfigError>() || error.is::<UsageError>() {
        return ExitCode::from(EXIT_USAGE);
    }
    ExitCode::FAILURE
}

/// `list | head` is no error: whoever reads has read enough. Only our own output fails with a bare
/// `io::Error`; the control socket's are a `ClientError`.
fn quiet_if_closed(done: anyhow::Result<()>) -> anyhow::Result<()> {
    match done {
        Err(error)
            if error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) =>
        {
            Ok(())
        }
        done => done,
    }
}

impl Query {
    /// Asks the agent, and hands each line of its answer to `each`.
    fn ask(
        &self,
        request: &Request,
        mut each: impl FnMut(Response) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut client = Client::connect(&self.control)?;
        for answer in client.ask(request)? {
            each(answer?)?;
        }
        Ok(())
    }
}

/// An answer to something else than what was asked.
fn unexpected(answer: &Response) -> anyhow::Error {
    anyhow::anyhow!("the agent answers something else: {answer:?}")
        .context("are the versions of both the same?")
}

/// All at once at the end, so that a table appears whole.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// For people, beside the output proper.
fn say(text: &str) -> anyhow::Result<()> {
    writeln!(io::stderr(), "{text}").context("stderr is closed")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_setting_has_its_flag() {
        let line = "dhcp-reclaim run --bridge br0 --bridge br1 --port vnet* --uplink eth0 \
            --hook xdp --commit request --bpffs /bpf --control /c --expedite --dry-run --sandbox log --silence 30s \
            --probe-rate 100 --probe-interval 10s --misses 3 --hold-down 2s --hold-down-uplink 10s \
            --hold-down-silent 5m --port-up never --settle 3s --min-remaining 10s --breaker off \
            --breaker-min 32 --breaker-window 60s --rate 50 --burst 64 --record-rate 15 \
            --record-burst 60 --bindings-per-port 256 --config /x --log-level debug \
            --import /l,server=10.0.0.1 --ask-server 10.0.0.1 --metrics [::1]:9798 --log-format json";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Run(args) = cli.command else {
            panic!()
        };
        let settings = Settings::load(args.options, None).unwrap();
        assert_eq!(settings.bridges, ["br0", "br1"]);
        assert!(settings.dry_run);
    }

    #[test]
    fn a_dry_run_takes_its_value_only_with_an_equals_sign() {
        let parse = |line: &str| {
            let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
            let Command::Run(args) = cli.command else {
                panic!()
            };
            args.options.dry_run
        };
        assert_eq!(parse("dhcp-reclaim run --bridge br0"), None);
        assert_eq!(parse("dhcp-reclaim run --dry-run --bridge br0"), Some(true));
        assert_eq!(
            parse("dhcp-reclaim run --dry-run=false --bridge br0"),
            Some(false)
        );
    }

    #[test]
    fn durations_without_a_unit_are_wrong_usage() {
        let error = Cli::try_parse_from(["dhcp-reclaim", "run", "--hold-down", "2"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("has no unit"), "{error}");
    }

    #[test]
    fn exit_codes() {
        let no_agent = ClientError::NoAgent(Path::new("/c").to_owned());
        assert_eq!(exit_code(&no_agent.into()), ExitCode::from(3));
        let config = Settings::load(Default::default(), None).unwrap_err();
        assert_eq!(exit_code(&config.into()), ExitCode::from(2));
        assert_eq!(exit_code(&anyhow::anyhow!("other")), ExitCode::from(1));
    }

    #[test]
    fn a_closed_pipe_is_quiet() {
        let closed = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(quiet_if_closed(Err(closed.into())).is_ok());
        assert!(quiet_if_closed(Err(anyhow::anyhow!("other"))).is_err());
        let socket = ClientError::Broken(io::ErrorKind::BrokenPipe.into());
        assert!(quiet_if_closed(Err(socket.into())).is_err());
    }
}
