//! `herd models inspect`: what a directory holds, and what each rank would hold of it. It reads headers and no weights.

mod checkpoint;
mod text;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use herd_model::{
    Dtype, Linear, ModelConfig, Parallelism, Part, ShardPlan, StoredTensor, kv_bytes_of_rank, kv_tokens,
    weight_bytes,
};
use serde::Serialize;

use self::checkpoint::{Checkpoint, Quantization};

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// Model directory: config.json, and safetensors, their index, a list in tensors.tsv, or nothing more
    directory: PathBuf,
    /// Ranks that share each layer
    #[arg(long, default_value_t = 1)]
    tensor: usize,
    /// Stages that the layers are split over
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
    /// What each rank has for weights and KV: bytes, or a number with KiB, MiB, GiB or TiB
    #[arg(long, value_parser = parse_bytes)]
    memory: Option<u64>,
    /// Of KV: bf16 or f32
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// How it is printed
    #[arg(long, short, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Prints it.
pub(super) fn run(arguments: &InspectArguments) -> anyhow::Result<()> {
    let InspectArguments { directory, tensor, pipeline, memory, dtype, output } = arguments;
    let checkpoint = Checkpoint::read(directory)?;
    let parallelism = Parallelism { tensor: *tensor, pipeline: *pipeline };
    let inspection = Inspection::of(checkpoint, parallelism, *memory, *dtype)
        .with_context(|| directory.display().to_string())?;
    match output {
        Output::Text => print!("{inspection}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&inspection)?),
    }
    Ok(())
}

/// All that is printed.
#[derive(Debug, Serialize)]
struct Inspection {
    model: Model,
    quantization: Option<Quantization>,
    weights: Weights,
    parallelism: Degrees,
    ranks: Vec<Rank>,
    kv: Kv,
    /// Where a memory was given: whether the weights of every rank and a block of KV fit.
    fits: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Model {
    architecture: String,
    /// Scales are none.
    parameters: u64,
    layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    context_length: usize,
    tied_embeddings: bool,
}

#[derive(Debug, Serialize)]
struct Weights {
    /// What the sizes were read from.
    from: String,
    files: usize,
    tensors: usize,
    bytes: u64,
    /// Bytes by kind of tensor and by format.
    kinds: BTreeMap<Kind, BTreeMap<String, u64>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Embedding,
    Attention,
    FeedForward,
    Norms,
    OutputHead,
    Unused,
}

#[derive(Debug, Serialize)]
struct Degrees {
    tensor: usize,
    pipeline: usize,
}

#[derive(Debug, Serialize)]
struct Rank {
    #[serde(rename = "rank")]
    number: usize,
    stage: usize,
    /// The first, and the one after the last.
    layers: [usize; 2],
    weight_bytes: u64,
    kv_bytes_per_token: u64,
}

#[derive(Debug, Serialize)]
struct Kv {
    dtype: String,
    /// Of all ranks, each KV head once.
    bytes_per_token: u64,
    memory_bytes: Option<u64>,
    /// That fit beside the weights of the fullest rank.
    tokens: Option<u64>,
}

impl Inspection {
    fn of(
        checkpoint: Checkpoint,
        parallelism: Parallelism,
        memory: Option<u64>,
        dtype: Dtype,
    ) -> anyhow::Result<Self> {
        let Checkpoint { config, architecture, quantization, tensors, files, from } = checkpoint;
        let plan = ShardPlan::new(&config, parallelism)?;
        let bytes = weight_bytes(&config, &plan, &tensors)?;
        let tokens = memory.and_then(|memory| kv_tokens(&config, &plan, &bytes, dtype, memory));
        let ranks = plan.ranks().iter().zip(bytes).map(|(shard, weight_bytes)| Rank {
            number: shard.rank,
            stage: shard.stage,
            layers: [shard.layers.start, shard.layers.end],
            weight_bytes,
            kv_bytes_per_token: kv_bytes_of_rank(&config, shard, dtype),
        });
        Ok(Self {
            ranks: ranks.collect(),
            model: Model::of(&config, architecture, &tensors),
            quantization,
            weights: Weights::of(&config, &tensors, files, from),
            parallelism: Degrees { tensor: parallelism.tensor, pipeline: parallelism.pipeline },
            kv: Kv {
                dtype: dtype.to_string(),
                bytes_per_token: config.kv_bytes_per_token(dtype.bytes()) as u64,
                memory_bytes: memory,
                tokens,
            },
            fits: memory.map(|_| tokens.is_some_and(|tokens| tokens > 0)),
        })
    }
}

impl Model {
    fn of(config: &ModelConfig, architecture: String, tensors: &[StoredTensor]) -> Self {
        let counts = |tensor: &&StoredTensor| {
            !matches!(Part::of(config, &tensor.name), Part::Scale { .. } | Part::Unused)
        };
        Self {
            architecture,
            parameters: tensors.iter().filter(counts).map(StoredTensor::numbers).sum(),
            layers: config.layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            context_length: config.context_length,
            tied_embeddings: config.tied_embeddings,
        }
    }
}

impl Weights {
    fn of(config: &ModelConfig, tensors: &[StoredTensor], files: usize, from: String) -> Self {
        let mut kinds: BTreeMap<Kind, BTreeMap<String, u64>> = BTreeMap::new();
        for tensor in tensors {
            let kind = Kind::of(Part::of(config, &tensor.name));
            *kinds.entry(kind).or_default().entry(tensor.format.to_string()).or_default() += tensor.bytes();
        }
        let bytes = tensors.iter().map(StoredTensor::bytes).sum();
        Self { from, files, tensors: tensors.len(), bytes, kinds }
    }
}

impl Kind {
    fn of(part: Part) -> Self {
        match part {
            Part::Embedding => Self::Embedding,
            Part::OutputHead => Self::OutputHead,
            Part::FinalNorm | Part::LayerNorm { .. } => Self::Norms,
            Part::Weight { linear, .. } | Part::Scale { linear, .. } => match linear {
                Linear::Query | Linear::Key | Linear::Value | Linear::Output => Self::Attention,
                Linear::Gate | Linear::Up | Linear::Down => Self::FeedForward,
            },
            Part::Unused => Self::Unused,
        }
    }
}

const UNITS: [(&str, u64); 5] =
    [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let (digits, unit) = (digits.trim(), &text[digits.len()..]);
    let Some((_, unit)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(format!("{unit:?} is not KiB, MiB, GiB or TiB"));
    };
    let number: u64 = digits.parse().map_err(|_| format!("{digits:?} is not a whole number"))?;
    number.checked_mul(*unit).ok_or_else(|| format!("{text} is too much"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_a_unit() {
        assert_eq!(parse_bytes("80GiB"), Ok(80 << 30));
        assert_eq!(parse_bytes("7"), Ok(7));
        assert_eq!(parse_bytes("80GB"), Err("\"GB\" is not KiB, MiB, GiB or TiB".to_owned()));
        assert!(parse_bytes("GiB").is_err() && parse_bytes("99999999999TiB").is_err());
    }
}
