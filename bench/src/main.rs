//! `herd-bench`, which `cargo xtask bench` builds and runs. What is compared runs in turns within one run, on a machine that
//! does nothing else.

mod gang;
mod gateway;
mod kv;
mod measure;
mod scaling;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Map, Value};

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What a fleet costs: the gateway a token, a KV transfer a byte, a gang of three processes a step, more load the time to follow it
    Fleet {
        /// Folder with the checkpoint of SmolLM2 in FP8.
        #[arg(long)]
        model: PathBuf,
        /// Folder with the tokenizer of a model of 1024 tokens or more.
        #[arg(long)]
        tokenizer: PathBuf,
        /// The kubectl of a cluster with Herd in it; scaling needs it.
        #[arg(long)]
        kubectl: Option<PathBuf>,
        /// Where the figures go, as JSON; those of parts that are not run stay.
        #[arg(long)]
        out: PathBuf,
        /// What is measured.
        #[arg(required = true)]
        parts: Vec<Part>,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    Gateway,
    Kv,
    Gang,
    Scaling,
}

fn main() -> Result<()> {
    let Bench::Fleet { model, tokenizer, kubectl, out, parts } = Args::parse().bench;
    let mut figures = earlier(&out)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for part in parts {
        let (name, measured) = runtime.block_on(async {
            match part {
                Part::Gateway => ("gateway", gateway::run(&tokenizer).await),
                Part::Kv => ("kv", kv::run().await),
                Part::Gang => ("gang", gang::run(&model).await),
                Part::Scaling => (
                    "scaling",
                    match &kubectl {
                        Some(kubectl) => scaling::run(kubectl).await,
                        None => Err(anyhow::anyhow!("needs --kubectl")),
                    },
                ),
            }
        });
        figures.insert(name.to_owned(), measured.context(name)?);
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    figures.insert("cores".to_owned(), cores.into());
    let text = serde_json::to_string_pretty(&figures)? + "\n";
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    std::fs::write(&out, text).with_context(|| out.display().to_string())?;
    println!("written to {}", out.display());
    Ok(())
}

/// What an earlier run has measured.
fn earlier(out: &Path) -> Result<Map<String, Value>> {
    match std::fs::read_to_string(out) {
        Ok(text) => serde_json::from_str(&text).with_context(|| out.display().to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(error).with_context(|| out.display().to_string()),
    }
}
