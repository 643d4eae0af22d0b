//! `herd-bench`, which `cargo xtask bench` builds and runs. What is compared runs in turns within one run, on a machine that
//! does nothing else.

mod gang;
mod gateway;
mod kv;
mod measure;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use serde_json::json;

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What a fleet costs: the gateway a token, a KV transfer a byte, a gang of three processes a step
    Fleet {
        /// Folder with the checkpoint of SmolLM2 in FP8.
        #[arg(long)]
        model: PathBuf,
        /// Folder with the tokenizer of a model of 1024 tokens or more.
        #[arg(long)]
        tokenizer: PathBuf,
        /// Where the figures go, as JSON.
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> Result<()> {
    let Bench::Fleet { model, tokenizer, out } = Args::parse().bench;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let figures = runtime.block_on(async {
        let gateway = gateway::run(&tokenizer).await.context("gateway")?;
        let kv = kv::run().await.context("kv")?;
        let gang = gang::run(&model).await.context("gang")?;
        anyhow::Ok(json!({
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "gateway": gateway, "kv": kv, "gang": gang,
        }))
    })?;
    let text = serde_json::to_string_pretty(&figures)? + "\n";
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    std::fs::write(&out, text).with_context(|| out.display().to_string())?;
    println!("written to {}", out.display());
    Ok(())
}
