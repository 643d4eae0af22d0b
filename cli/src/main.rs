//! The `herd` command.

mod chat;
mod models;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    /// Make checkpoints: import GGUF files, quantize
    #[command(subcommand)]
    Models(models::ModelsCommand),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Chat(arguments) => chat::run(arguments),
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
