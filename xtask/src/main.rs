//! Every developer command: `cargo xtask --help`.

mod cargo_test;
mod cluster;
mod go_test;
mod models;
mod paths;
mod step;
mod test;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of Herd
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check everything; the last line says how many checks passed and failed
    Test {
        /// Only what needs no downloaded model: format, lints, licences, tests, documentation
        #[arg(long)]
        fast: bool,
    },
    /// Check format, lints, licences and documentation
    Lint,
    /// Format the code
    Fmt,
    /// Fetch SmolLM2-135M and make bf16 and FP8 checkpoints of it, where they are not there already
    Models,
    /// A real Kubernetes on this machine
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Build the tools that the checks use into the cache folder, where they are not there already
    Tools,
}

fn main() -> anyhow::Result<ExitCode> {
    let paths = paths::Paths::find()?;
    match Cli::parse().command {
        Command::Test { fast } => Ok(test::run(&paths, fast)),
        Command::Lint => Ok(test::lint(&paths)),
        Command::Fmt => test::fmt(&paths),
        Command::Models => {
            for line in models::make(&paths)? {
                println!("{line}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Cluster(command) => {
            cluster::run(&paths, command)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Tools => {
            tools::install(&paths)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
