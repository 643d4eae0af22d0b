//! The `herd` command.

mod bench;
mod chat;
mod models;
mod serve;
mod server_url;
mod status;
mod text_model;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

/// Serve Llama models as a sharded fleet
#[derive(Debug, Parser)]
#[command(name = "herd", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a checkpoint with a whole fleet in this process
    Serve(serve::ServeArguments),
    /// Talk to a served model
    Chat(chat::ChatArguments),
    /// Show pools, gangs, their load and the last scaling decisions
    Status(status::StatusArguments),
    /// Put load on an OpenAI server and measure how it answers
    Bench(bench::BenchArguments),
    /// Make checkpoints: import GGUF files, quantize; inspect one
    #[command(subcommand)]
    Models(models::ModelsCommand),
}

/// As `kubectl-herd` it is a plugin: `kubectl herd status`.
fn parse() -> Cli {
    let called = std::env::args_os().next().map(PathBuf::from);
    let plugin = called.is_some_and(|path| path.file_stem().is_some_and(|name| name == "kubectl-herd"));
    let command = if plugin { Cli::command().bin_name("kubectl herd") } else { Cli::command() };
    Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

fn main() -> ExitCode {
    let result = match parse().command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Chat(arguments) => chat::run(arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Models(command) => models::run(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
