//! `cargo xtask bench`: figures beside those of a peer in the same run. Never a test.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Subcommand;

use crate::paths::Paths;
use crate::{binaries, models, progress};

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum BenchCommand {
    /// What a fleet costs: the gateway a token, a KV transfer a byte, a gang of three processes a step
    Fleet,
}

/// Runs it in the foreground.
pub(crate) fn run(paths: &Paths, bench: BenchCommand) -> Result<ExitCode> {
    let program = progress::step("programs", |activity| binaries::bench(paths, activity))?;
    models::make(paths)?;
    let mut command = Command::new(program);
    match bench {
        BenchCommand::Fleet => command
            .arg("fleet")
            .arg("--model")
            .arg(paths.models.join(models::FP8))
            .arg("--tokenizer")
            .arg(paths.root.join("fixtures/tiny-llama31/tiny-llama31-bf16"))
            .arg("--out")
            .arg(paths.root.join("bench/results/fleet.json")),
    };
    let status = command.status().context("failed to run herd-bench")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
