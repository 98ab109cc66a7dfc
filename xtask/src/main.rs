//! What a developer does with this repository: set up, run the demo, run the tests.
use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod cargo;
mod coverage;
mod demo;
mod dist;
mod fuzz;
mod guard;
mod mutants;
mod pure;
mod run;
mod setup;
mod test;
mod vm;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building, running and testing need, and nothing that is already there
    Setup(setup::Args),
    /// Show the main job in a lab of its own; or, after `--`, run the agent on this host
    Run(run::Args),
    /// Check format and lints, and run every test
    Test(test::Args),
    /// Measure what it costs and how fast it is, beside what people use today
    Bench(bench::Args),
    /// Feed hostile bytes to everything that reads some
    Fuzz(fuzz::Args),
    /// Report which lines of core, packet and wire the tests run
    Coverage,
    /// Change the core in every small way, and tell which changes no test notices
    Mutants(mutants::Args),
    /// Build what is handed to others: packages, and a binary that needs nothing
    Dist(dist::Args),
    /// Run the system tests on other kernels, each in a machine booted for it
    Vm(vm::Args),
    /// Take down a lab that `run --keep` left up
    LabDown,
    /// Run a command, or a shell, inside a kept lab
    LabShell(run::ShellArgs),
    /// The root side of `run`: keeps the sandbox
    #[command(name = "__lab", hide = true)]
    Lab(run::LabArgs),
    /// The inner side of `run`: the first process of the sandbox
    #[command(name = "__demo", hide = true)]
    Demo(run::LabArgs),
    /// The first process of a machine under test
    #[command(name = "__guest", hide = true)]
    Guest,
    /// Runs a program for as long as standard input stays open
    #[command(name = "__guard", hide = true)]
    Guard {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let result = dispatch(Cli::parse().task);
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn dispatch(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup(args) => setup::main(&args),
        Task::Run(args) => run::main(&args),
        Task::Test(args) => test::main(&args),
        Task::Bench(args) => bench::main(&args),
        Task::Fuzz(args) => fuzz::main(&args),
        Task::Coverage => coverage::main(),
        Task::Mutants(args) => mutants::main(&args),
        Task::Dist(args) => dist::main(&args),
        Task::Vm(args) => vm::main(&args),
        Task::Guest => vm::guest::main(),
        Task::LabDown => run::down(),
        Task::LabShell(args) => run::shell(&args),
        Task::Lab(args) => run::lab(&args),
        Task::Demo(args) => demo::main(&args),
        Task::Guard { command } => guard::until_stdin_closes(&command),
    }
}
