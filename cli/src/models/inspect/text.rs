//! The inspection as text.

use std::fmt;

use super::{Inspection, Kind, Rank};

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, quantization, weights, parallelism, ranks, kv, fits } = self;
        let billions = model.parameters as f64 / 1e9;
        write!(f, "{}, {billions:.2} billion parameters", model.architecture)?;
        if let Some(quantization) = quantization {
            let served = if quantization.is_served { "" } else { ", which Herd does not serve" };
            write!(f, ", {}{served}", quantization.method)?;
        }
        writeln!(
            f,
            "\n{} layers, hidden size {}, feed-forward {}, {} heads of {}, {} KV heads, vocabulary {}{}, context {}",
            model.layers,
            model.hidden_size,
            model.intermediate_size,
            model.heads,
            model.head_dim,
            model.kv_heads,
            model.vocab_size,
            if model.tied_embeddings { " (tied)" } else { "" },
            model.context_length,
        )?;
        let files = match weights.files {
            0 => String::new(),
            1 => " in 1 file".to_owned(),
            files => format!(" in {files} files"),
        };
        writeln!(
            f,
            "{} of weights, {} tensors{files}; by {}",
            gigabytes(weights.bytes),
            weights.tensors,
            weights.from
        )?;
        for (kind, formats) in &weights.kinds {
            let formats: Vec<String> =
                formats.iter().map(|(format, bytes)| format!("{format} {}", gigabytes(*bytes))).collect();
            writeln!(f, "  {:<13} {}", kind.name(), formats.join(", "))?;
        }
        writeln!(
            f,
            "\ntensor {} x pipeline {}: {} ranks",
            parallelism.tensor,
            parallelism.pipeline,
            ranks.len()
        )?;
        writeln!(f, "  RANKS      STAGE  LAYERS     WEIGHTS        KV PER TOKEN")?;
        for same in ranks.chunk_by(alike) {
            let [first, last] = [same.first(), same.last()].map(|rank| rank.map_or(0, |rank| rank.number));
            let Some(rank) = same.first() else { continue };
            let numbers = if first == last { first.to_string() } else { format!("{first}-{last}") };
            let layers = format!("{}-{}", rank.layers[0], rank.layers[1] - 1);
            writeln!(
                f,
                "  {numbers:<9}  {:<5}  {layers:<9}  {:<13}  {} bytes",
                rank.stage,
                gigabytes(rank.weight_bytes),
                rank.kv_bytes_per_token
            )?;
        }
        writeln!(f, "\nKV of a token has {} bytes in {}", kv.bytes_per_token, kv.dtype)?;
        let Some(memory) = kv.memory_bytes else { return Ok(()) };
        let fullest = ranks.iter().map(|rank| rank.weight_bytes).max().unwrap_or_default();
        let of = format!(
            "{} of weights in {:.2} GiB a rank",
            gigabytes(fullest),
            memory as f64 / f64::from(1 << 30)
        );
        match (fits, kv.tokens) {
            (Some(true), Some(tokens)) => writeln!(
                f,
                "fits: {of}, and KV of {tokens} tokens, {:.1} times the context; what steps compute in comes on top",
                tokens as f64 / model.context_length as f64
            ),
            _ => writeln!(f, "does not fit: {of}"),
        }
    }
}

fn alike(one: &Rank, other: &Rank) -> bool {
    one.stage == other.stage
        && one.weight_bytes == other.weight_bytes
        && one.kv_bytes_per_token == other.kv_bytes_per_token
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::FeedForward => "feed-forward",
            Self::Norms => "norms",
            Self::OutputHead => "output head",
            Self::Unused => "not used",
        }
    }
}

fn gigabytes(bytes: u64) -> String {
    if bytes < 100_000_000 {
        format!("{:.1} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.2} GB", bytes as f64 / 1e9)
    }
}
