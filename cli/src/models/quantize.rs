//! Quantizing, as a command of its own and at the end of an import: calibrate, choose, convert.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use herd_engine::convert::calibration::{ByHand, PROMPTS, USUAL_BOUND, calibrate};
use herd_engine::convert::{self, FileSum, Progress, Quantization};

use crate::text_model;

/// Far above what [`herd_engine::convert::calibration::MAX_TOKENS`] can come from.
const MAX_PROMPTS_BYTES: u64 = 1 << 20;

/// How to quantize.
#[derive(Debug, Args)]
pub(crate) struct QuantizeOptions {
    /// Layers that stay as they are, such as 0,11,28,29 [default: what calibration chooses]
    #[arg(long, value_delimiter = ',')]
    keep_layers: Option<Vec<usize>>,
    /// Bound of a token's largest activation when it is quantized at run time, in the layout that has one [default: what
    /// calibration chooses]
    #[arg(long)]
    bound: Option<f32>,
    /// File of prompts to calibrate on, one a line [default: built-in texts]
    #[arg(long, value_name = "FILE", conflicts_with = "no_calibration")]
    calibrate: Option<PathBuf>,
    /// Run nothing: keep what is usual for the layout, first and last layer and a bound of 1200, or no layer
    #[arg(long)]
    no_calibration: bool,
    /// Threads that calibration computes on [default: all processors]
    #[arg(long)]
    threads: Option<usize>,
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

impl QuantizeOptions {
    /// Whether something was asked for.
    pub(super) fn is_given(&self) -> bool {
        let Self { keep_layers, bound, calibrate, no_calibration, threads } = self;
        keep_layers.is_some()
            || bound.is_some()
            || calibrate.is_some()
            || *no_calibration
            || threads.is_some()
    }
}

/// Quantizes `model` into `out`; prints what calibration has found.
pub(super) fn run(
    model: &Path,
    out: &Path,
    to: Layout,
    options: &QuantizeOptions,
    force: bool,
    progress: &dyn Progress,
) -> anyhow::Result<Vec<FileSum>> {
    let QuantizeOptions { keep_layers, bound, calibrate: file, no_calibration, threads } = options;
    let keep_layers = keep_layers.as_ref().map(|layers| layers.iter().copied().collect::<BTreeSet<_>>());
    let layout = match to {
        Layout::FbgemmFp8 => {
            convert::Layout::FbgemmFp8 { activation_scale_ub: f64::from(bound.unwrap_or(USUAL_BOUND)) }
        }
        Layout::CompressedTensors => {
            ensure!(bound.is_none(), "--bound is of fbgemm_fp8: compressed-tensors has no bound");
            convert::Layout::CompressedTensors
        }
    };
    let quantization = if *no_calibration {
        Quantization { layout, keep_layers, report: None }
    } else {
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        ensure!(threads > 0, "--threads is 0; there has to be at least one");
        let prompts = prompts(model, file.as_deref())?;
        let by_hand = ByHand { keep_layers, bound: *bound };
        let calibration = calibrate(model, layout, &by_hand, &prompts, threads, progress)?;
        println!("{calibration}");
        calibration.quantization(layout)
    };
    Ok(convert::quantize(model, out, &quantization, force, progress)?)
}

/// Token ids of the prompts to calibrate on.
fn prompts(model: &Path, file: Option<&Path>) -> anyhow::Result<Vec<Vec<u32>>> {
    let text = file.map(read_prompts).transpose()?;
    let lines = text.as_ref().map_or_else(
        || PROMPTS.to_vec(),
        |text| text.lines().filter(|line| !line.trim().is_empty()).collect(),
    );
    let tokenizer = text_model::read(model).with_context(|| {
        format!("calibration needs the tokenizer of {}; --no-calibration does without", model.display())
    })?;
    lines.into_iter().map(|line| Ok(tokenizer.encode(line, true)?)).collect()
}

fn read_prompts(path: &Path) -> anyhow::Result<String> {
    let error = || path.display().to_string();
    let bytes = std::fs::metadata(path).with_context(error)?.len();
    ensure!(
        bytes <= MAX_PROMPTS_BYTES,
        "{}: {bytes} bytes; at most {MAX_PROMPTS_BYTES} are read",
        path.display()
    );
    std::fs::read_to_string(path).with_context(error)
}
