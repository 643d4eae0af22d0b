//! `herd-bench`, which `cargo xtask bench` builds and runs. What is compared runs in turns within one run, on a machine that
//! does nothing else.

mod engine;
mod gang;
mod gateway;
mod kv;
mod measure;
mod results;
mod scaling;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};

use self::results::Results;

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
    /// The engine against llama.cpp.
    Engine(engine::EngineArgs),
    /// A turn of the engine, which `engine` starts.
    #[command(hide = true)]
    EngineTurn(engine::TurnArgs),
    /// Makes a model of random weights.
    #[command(hide = true)]
    RandomModel {
        /// The config.json of its shape.
        #[arg(long)]
        config: PathBuf,
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Part {
    Gateway,
    Kv,
    Gang,
    Scaling,
}

fn main() -> Result<ExitCode> {
    let (model, tokenizer, kubectl, out, parts) = match Args::parse().bench {
        Bench::Fleet { model, tokenizer, kubectl, out, parts } => (model, tokenizer, kubectl, out, parts),
        Bench::Engine(arguments) => {
            let (figures, met) = engine::run(&arguments)?;
            std::fs::write(&arguments.out, format!("{figures:#}\n"))?;
            println!("written to {}", arguments.out.display());
            return Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Bench::EngineTurn(arguments) => return engine::run_turn(&arguments).map(|()| ExitCode::SUCCESS),
        Bench::RandomModel { config, out } => {
            return engine::make_model(&config, &out).map(|()| ExitCode::SUCCESS);
        }
    };
    let mut figures = Results::read(&out)?;
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
        figures.set(name, &measured.context(name)?)?;
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    figures.set("cores", &cores.into())?;
    figures.write(&out)?;
    println!("written to {}", out.display());
    Ok(ExitCode::SUCCESS)
}
