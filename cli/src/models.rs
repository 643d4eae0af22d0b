//! `herd models`: makes checkpoints that Herd can serve, and says what one takes to be served.

mod inspect;

use std::collections::BTreeSet;
use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use herd_engine::convert::{self, FileSum, Progress, Quantization, SUMS_FILE, import_gguf};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// As Meta bounds the activations of the 405B.
const ACTIVATION_SCALE_UB: f64 = 1200.0;

/// Subcommands of `herd models`.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// Turn a GGUF file into a bf16 checkpoint in Hugging Face layout, with tokenizer and chat template
    Import {
        #[arg(help = "GGUF file of a Llama model (tensors in F32, F16, BF16, Q4_1 or Q8_0)")]
        file: PathBuf,
        /// Directory to make; it appears when everything is written
        #[arg(long)]
        out: PathBuf,
        /// Replace a model directory at --out
        #[arg(long)]
        force: bool,
    },
    /// Quantize a bf16 checkpoint
    Quantize {
        /// Model directory: config.json, safetensors, tokenizer
        model: PathBuf,
        /// Layout to make
        #[arg(long)]
        to: Layout,
        /// Layers that stay bf16, such as 0,11,28,29 [default: the first and the last, or none where all linears are
        /// quantized]
        #[arg(long, value_delimiter = ',')]
        keep_layers: Option<Vec<usize>>,
        /// Bound of a token's largest activation when it is quantized at run time, in the layout that has one [default: 1200]
        #[arg(long)]
        activation_scale_ub: Option<f64>,
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

/// What `herd models quantize` can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// Feed-forward weights in FP8 (e4m3) with a scale per row, as Meta's Llama 3.1 405B FP8
    #[value(name = "fbgemm_fp8")]
    FbgemmFp8,
    /// All linears of the decoder in FP8 (e4m3) with a scale per row, as vLLM reads it
    #[value(name = "compressed-tensors")]
    CompressedTensors,
}

/// Runs a `herd models` command; prints a checksum per file that it made, or what it found.
pub(crate) fn run(command: ModelsCommand) -> anyhow::Result<()> {
    let progress = Reporter::default();
    let (sums, out) = match command {
        ModelsCommand::Import { file, out, force } => (import_gguf(&file, &out, force, &progress)?, out),
        ModelsCommand::Quantize { model, to, keep_layers, activation_scale_ub, out, force } => {
            let keep_layers = keep_layers.map(BTreeSet::from_iter);
            let layout = match (to, activation_scale_ub) {
                (Layout::FbgemmFp8, bound) => {
                    convert::Layout::FbgemmFp8 { activation_scale_ub: bound.unwrap_or(ACTIVATION_SCALE_UB) }
                }
                (Layout::CompressedTensors, None) => convert::Layout::CompressedTensors,
                (Layout::CompressedTensors, Some(_)) => {
                    anyhow::bail!("--activation-scale-ub is of fbgemm_fp8: compressed-tensors has no bound")
                }
            };
            let quantization = Quantization { layout, keep_layers };
            (convert::quantize(&model, &out, &quantization, force, &progress)?, out)
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
