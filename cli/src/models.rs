//! `herd models`: makes checkpoints that Herd can serve, and says what one takes to be served.

mod import;
mod inspect;
mod quantize;

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::Subcommand;
use herd_engine::convert::{FileSum, Progress, SUMS_FILE};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use self::quantize::{Layout, QuantizeOptions};

/// Subcommands of `herd models`.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// Turn a GGUF file into a checkpoint in Hugging Face layout, with tokenizer and chat template
    Import {
        #[arg(help = "GGUF file of a Llama model (tensors in F32, F16, BF16, Q4_0, Q4_1 or Q8_0)")]
        file: PathBuf,
        /// What to make of it; other than bf16, it is quantized as `herd models quantize` does it
        #[arg(long, default_value = "bf16")]
        to: import::Target,
        #[command(flatten)]
        options: QuantizeOptions,
        /// Directory to make; it appears when everything is written
        #[arg(long)]
        out: PathBuf,
        /// Replace a model directory at --out
        #[arg(long)]
        force: bool,
    },
    /// Quantize a checkpoint in bf16, f16 or f32: a few prompts show which layers FP8 does not suit
    Quantize {
        /// Model directory: config.json, safetensors, tokenizer
        model: PathBuf,
        /// Layout to make
        #[arg(long)]
        to: Layout,
        #[command(flatten)]
        options: QuantizeOptions,
        /// Directory to make; it appears when everything is written
        #[arg(long)]
        out: PathBuf,
        /// Replace a model directory at --out
        #[arg(long)]
        force: bool,
    },
    /// Say what a checkpoint holds, what each rank would hold of it, and whether that fits
    Inspect(inspect::InspectArguments),
}

/// Runs a `herd models` command; prints a checksum per file that it made, or what it found.
pub(crate) fn run(command: ModelsCommand) -> anyhow::Result<()> {
    let progress = Reporter::default();
    let (sums, out) = match command {
        ModelsCommand::Import { file, to, options, out, force } => {
            (import::run(&file, &out, to, &options, force, &progress)?, out)
        }
        ModelsCommand::Quantize { model, to, options, out, force } => {
            (quantize::run(&model, &out, to, &options, force, &progress)?, out)
        }
        ModelsCommand::Inspect(arguments) => return inspect::run(&arguments),
    };
    progress.finish();
    for FileSum { name, bytes, sha256 } in &sums {
        println!("{sha256}  {name}  {}", HumanBytes(*bytes));
    }
    println!("{} is complete; checksums are in {SUMS_FILE}", out.display());
    Ok(())
}

/// A bar on a terminal; else a line per stage and per quarter of it.
#[derive(Default)]
struct Reporter {
    stage: Mutex<Option<Stage>>,
}

struct Stage {
    name: String,
    bar: ProgressBar,
    /// Quarters printed so far.
    quarters: u64,
}

impl Reporter {
    fn finish(&self) {
        if let Some(stage) = self.stage.lock().unwrap_or_else(PoisonError::into_inner).take() {
            stage.bar.finish_and_clear();
        }
    }
}

impl Progress for Reporter {
    fn stage(&self, name: &str, total_bytes: u64) {
        self.finish();
        let bar = if stderr().is_terminal() {
            let bar = ProgressBar::new(total_bytes);
            let template = "{msg:10} {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        } else {
            eprintln!("{name}: {} to do", HumanBytes(total_bytes));
            let bar = ProgressBar::hidden();
            bar.set_length(total_bytes);
            bar
        };
        let stage = Stage { name: name.to_owned(), bar, quarters: 0 };
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = Some(stage);
    }

    fn advance(&self, bytes: u64) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Stage { name, bar, quarters }) = stage.as_mut() else { return };
        bar.inc(bytes);
        let reached = 4 * bar.position() / bar.length().unwrap_or(1).max(1);
        if reached > *quarters && !stderr().is_terminal() {
            *quarters = reached;
            eprintln!("{name}: {} %", 25 * reached);
        }
    }
}
