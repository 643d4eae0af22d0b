//! How many bytes of a checkpoint each rank holds, and how much KV fits beside them: known from names, formats and shapes
//! alone, before a byte of weights is there.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::{BLOCK_TOKENS, Dtype, Linear, ModelConfig, RankShard, ShardPlan};

/// The number format of a stored tensor, as safetensors names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StoredFormat {
    /// 64-bit floating point.
    F64,
    /// 32-bit floating point.
    F32,
    /// 16-bit floating point.
    F16,
    /// The upper half of an `F32`.
    Bf16,
    /// Three bits of mantissa.
    F8E4m3,
    /// Two bits of mantissa.
    F8E5m2,
    /// Eight bytes.
    I64,
    /// Four bytes.
    I32,
    /// A byte with a sign.
    I8,
    /// A byte.
    U8,
}

impl StoredFormat {
    const ALL: [(Self, &str, u64); 10] = [
        (Self::F64, "F64", 8),
        (Self::F32, "F32", 4),
        (Self::F16, "F16", 2),
        (Self::Bf16, "BF16", 2),
        (Self::F8E4m3, "F8_E4M3", 1),
        (Self::F8E5m2, "F8_E5M2", 1),
        (Self::I64, "I64", 8),
        (Self::I32, "I32", 4),
        (Self::I8, "I8", 1),
        (Self::U8, "U8", 1),
    ];

    /// Of one number.
    pub fn bytes(self) -> u64 {
        Self::ALL.iter().find(|(format, ..)| *format == self).map_or(0, |(.., bytes)| *bytes)
    }
}

impl fmt::Display for StoredFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(format, ..)| format == self).map_or("", |(_, name, _)| name))
    }
}

impl FromStr for StoredFormat {
    type Err = SizeError;

    fn from_str(word: &str) -> Result<Self, SizeError> {
        let found = Self::ALL.iter().find(|(_, name, _)| *name == word);
        found.map(|(format, ..)| *format).ok_or_else(|| SizeError::Format(word.to_owned()))
    }
}

/// A tensor of a checkpoint, without its numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// `model.layers.0.mlp.up_proj.weight`
    pub name: String,
    /// Of its numbers.
    pub format: StoredFormat,
    /// Rows first.
    pub shape: Vec<usize>,
}

/// What a tensor is to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// A row a token.
    Embedding,
    /// A row a token, where it is not the embedding.
    OutputHead,
    /// Before the output head.
    FinalNorm,
    /// One of the two of a layer.
    LayerNorm {
        /// Its layer.
        layer: usize,
    },
    /// Of a linear.
    Weight {
        /// Its layer.
        layer: usize,
        /// Which of the seven.
        linear: Linear,
    },
    /// Of the rows of an FP8 weight.
    Scale {
        /// Its layer.
        layer: usize,
        /// Which of the seven.
        linear: Linear,
    },
    /// Nothing that is computed with.
    Unused,
}

/// Tensors that do not make up the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// A word that is no format.
    #[error("unknown number format {0:?}")]
    Format(String),
    /// Not listed.
    #[error("tensor {0} is missing")]
    Missing(String),
    /// Of another model.
    #[error("tensor {name} is {stored:?}; this model's is {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// As listed.
        stored: Vec<usize>,
        /// By the configuration.
        expected: Vec<usize>,
    },
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const OUTPUT_HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "model.norm.weight";
const LAYER_NORMS: [&str; 2] = ["input_layernorm.weight", "post_attention_layernorm.weight"];

impl Part {
    /// Of the tensor of this name.
    pub fn of(config: &ModelConfig, name: &str) -> Self {
        match name {
            EMBEDDING => return Self::Embedding,
            OUTPUT_HEAD if !config.tied_embeddings => return Self::OutputHead,
            FINAL_NORM => return Self::FinalNorm,
            _ => {}
        }
        Self::of_layer(config, name).unwrap_or(Self::Unused)
    }

    fn of_layer(config: &ModelConfig, name: &str) -> Option<Self> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = layer.parse().ok().filter(|layer| *layer < config.layers)?;
        if LAYER_NORMS.contains(&rest) {
            return Some(Self::LayerNorm { layer });
        }
        let (module, kind) = name.rsplit_once('.')?;
        let linear = Linear::ALL.into_iter().find(|linear| linear.module(layer) == module)?;
        match kind {
            "weight" => Some(Self::Weight { layer, linear }),
            "weight_scale" => Some(Self::Scale { layer, linear }),
            _ => None,
        }
    }

    /// Of the whole tensor; a scale's is that of its rows.
    fn shape(self, config: &ModelConfig) -> Vec<usize> {
        match self {
            Self::Embedding | Self::OutputHead => vec![config.vocab_size, config.hidden_size],
            Self::FinalNorm | Self::LayerNorm { .. } => vec![config.hidden_size],
            Self::Weight { linear, .. } => linear.shape(config).to_vec(),
            Self::Scale { linear, .. } => vec![linear.shape(config)[0], 1],
            Self::Unused => Vec::new(),
        }
    }

    /// How many of its numbers a rank holds.
    fn numbers(self, config: &ModelConfig, plan: &ShardPlan, shard: &RankShard) -> usize {
        let (is_first, is_last) = (shard.stage == 0, plan.is_last(shard.stage));
        let rows_of_vocabulary = shard.vocab.len() * config.hidden_size;
        match self {
            Self::Embedding if is_first || (is_last && config.tied_embeddings) => rows_of_vocabulary,
            Self::OutputHead if is_last => rows_of_vocabulary,
            Self::FinalNorm if is_last => config.hidden_size,
            Self::LayerNorm { layer } if shard.layers.contains(&layer) => config.hidden_size,
            Self::Weight { layer, linear } if shard.layers.contains(&layer) => {
                let [outputs, inputs] = linear.slice(config, shard);
                outputs.len() * inputs.len()
            }
            Self::Scale { layer, linear } if shard.layers.contains(&layer) => {
                let [outputs, _] = linear.slice(config, shard);
                outputs.len()
            }
            _ => 0,
        }
    }
}

impl StoredTensor {
    /// Numbers in it.
    pub fn numbers(&self) -> u64 {
        self.shape.iter().map(|side| *side as u64).product()
    }

    /// Bytes in its file.
    pub fn bytes(&self) -> u64 {
        self.numbers() * self.format.bytes()
    }
}

/// Bytes of the checkpoint that each rank holds, by rank. Every tensor that the model is computed with has to be there.
pub fn weight_bytes(
    config: &ModelConfig,
    plan: &ShardPlan,
    tensors: &[StoredTensor],
) -> Result<Vec<u64>, SizeError> {
    let mut missing: BTreeMap<String, Part> = needed(config).into_iter().collect();
    let mut bytes = vec![0; plan.ranks().len()];
    for StoredTensor { name, format, shape } in tensors {
        let part = Part::of(config, name);
        if part == Part::Unused {
            continue;
        }
        let expected = part.shape(config);
        // Scales are a row or a column of numbers.
        let fits = if matches!(part, Part::Scale { .. }) {
            shape.iter().product::<usize>() == expected[0]
        } else {
            *shape == expected
        };
        if !fits {
            return Err(SizeError::Shape { name: name.clone(), stored: shape.clone(), expected });
        }
        missing.remove(name);
        for (bytes, shard) in bytes.iter_mut().zip(plan.ranks()) {
            *bytes += part.numbers(config, plan, shard) as u64 * format.bytes();
        }
    }
    match missing.into_keys().next() {
        Some(name) => Err(SizeError::Missing(name)),
        None => Ok(bytes),
    }
}

/// Names of the tensors that the model is computed with, but scales.
fn needed(config: &ModelConfig) -> Vec<(String, Part)> {
    let mut needed = vec![(EMBEDDING.to_owned(), Part::Embedding), (FINAL_NORM.to_owned(), Part::FinalNorm)];
    if !config.tied_embeddings {
        needed.push((OUTPUT_HEAD.to_owned(), Part::OutputHead));
    }
    for layer in 0..config.layers {
        let norms = LAYER_NORMS.map(|norm| format!("model.layers.{layer}.{norm}"));
        needed.extend(norms.into_iter().map(|name| (name, Part::LayerNorm { layer })));
        let weight =
            |linear: Linear| (format!("{}.weight", linear.module(layer)), Part::Weight { layer, linear });
        needed.extend(Linear::ALL.map(weight));
    }
    needed
}

/// The tensors of a checkpoint of which no header is there: linears for which `is_fp8` says so are in FP8 with scales of the
/// format `scale`, all else is stored in `format`.
pub fn expected_tensors(
    config: &ModelConfig,
    format: StoredFormat,
    scale: StoredFormat,
    is_fp8: impl Fn(Linear, usize) -> bool,
) -> Vec<StoredTensor> {
    let mut tensors = Vec::new();
    for (name, part) in needed(config) {
        let shape = part.shape(config);
        match part {
            Part::Weight { layer, linear } if is_fp8(linear, layer) => {
                let of_rows = Part::Scale { layer, linear }.shape(config);
                tensors.push(StoredTensor { name: format!("{name}_scale"), format: scale, shape: of_rows });
                tensors.push(StoredTensor { name, format: StoredFormat::F8E4m3, shape });
            }
            _ => tensors.push(StoredTensor { name, format, shape }),
        }
    }
    tensors
}

/// Bytes of keys and values of one token that a rank holds.
pub fn kv_bytes_of_rank(config: &ModelConfig, shard: &RankShard, dtype: Dtype) -> u64 {
    2 * (shard.layers.len() * shard.kv_heads.len() * config.head_dim * dtype.bytes()) as u64
}

/// Tokens of KV, in whole blocks, that every rank has room for beside its weights in `memory` bytes; none where the weights
/// of a rank alone are more.
pub fn kv_tokens(
    config: &ModelConfig,
    plan: &ShardPlan,
    weights: &[u64],
    dtype: Dtype,
    memory: u64,
) -> Option<u64> {
    let mut least = u64::MAX;
    for (weights, shard) in weights.iter().zip(plan.ranks()) {
        let tokens = memory.checked_sub(*weights)? / kv_bytes_of_rank(config, shard, dtype);
        least = least.min(tokens);
    }
    let block = BLOCK_TOKENS as u64;
    Some(least / block * block)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Parallelism;
    use crate::config::tests::{any_config, config_json, parse};

    fn bf16(config: &ModelConfig) -> Vec<StoredTensor> {
        expected_tensors(config, StoredFormat::Bf16, StoredFormat::F32, |_, _| false)
    }

    fn plan(config: &ModelConfig, tensor: usize, pipeline: usize) -> ShardPlan {
        ShardPlan::new(config, Parallelism { tensor, pipeline }).unwrap()
    }

    #[test]
    fn formats_and_words_are_inverse() {
        for (format, name, bytes) in StoredFormat::ALL {
            assert_eq!((format.to_string().parse(), format.bytes()), (Ok(format), bytes));
            assert_eq!(format.to_string(), name);
        }
        assert_eq!("F4".parse::<StoredFormat>().unwrap_err().to_string(), "unknown number format \"F4\"");
    }

    #[test]
    fn a_tensor_that_is_missing_or_of_another_model_is_named() {
        let config = parse(&config_json()).unwrap();
        let plan = plan(&config, 1, 1);
        let mut tensors = bf16(&config);
        tensors.push(StoredTensor {
            name: "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
            format: StoredFormat::F32,
            shape: vec![64],
        });
        assert_eq!(weight_bytes(&config, &plan, &tensors).unwrap(), [16_060_522_496]);
        let at = tensors.iter().position(|tensor| tensor.name.ends_with("3.mlp.up_proj.weight")).unwrap();
        tensors[at].shape = vec![4096, 14_336];
        let error = weight_bytes(&config, &plan, &tensors).unwrap_err().to_string();
        assert_eq!(
            error,
            "tensor model.layers.3.mlp.up_proj.weight is [4096, 14336]; this model's is [14336, 4096]"
        );
        tensors.remove(at);
        let error = weight_bytes(&config, &plan, &tensors).unwrap_err().to_string();
        assert_eq!(error, "tensor model.layers.3.mlp.up_proj.weight is missing");
    }

    #[test]
    fn kv_has_what_weights_leave_in_whole_blocks() {
        let config = parse(&config_json()).unwrap();
        let (one, two) = (plan(&config, 1, 1), plan(&config, 2, 2));
        assert_eq!(kv_bytes_of_rank(&config, &one.ranks()[0], Dtype::Bf16), 131_072);
        assert_eq!(kv_bytes_of_rank(&config, &two.ranks()[3], Dtype::F32), 65_536);
        let fits = |memory| kv_tokens(&config, &one, &[1000], Dtype::Bf16, memory);
        assert_eq!(fits(999), None);
        assert_eq!(fits(1000 + 64 * 131_072 - 1), Some(0));
        assert_eq!(fits(1000 + 129 * 131_072), Some(128));
        // The fullest rank decides.
        let tokens = kv_tokens(&config, &two, &[0, 0, 32_768 * 64, 0], Dtype::Bf16, 32_768 * 192);
        assert_eq!(tokens, Some(128));
    }

    proptest! {
        #[test]
        fn ranks_hold_the_checkpoint_and_what_they_share(
            config in any_config(), tensor in 1_usize..=16, pipeline in 1_usize..=4, tied: bool, fp8: bool,
        ) {
            let config = ModelConfig { tied_embeddings: tied, ..config };
            let Ok(plan) = ShardPlan::new(&config, Parallelism { tensor, pipeline }) else { return Ok(()) };
            let tensors = expected_tensors(&config, StoredFormat::Bf16, StoredFormat::F32, |_, layer| fp8 && layer > 0);
            let bytes = weight_bytes(&config, &plan, &tensors).unwrap();
            let times = |part: Part| match part {
                // KV heads that several ranks have, with the scales of their rows.
                Part::Weight { linear: Linear::Key | Linear::Value, .. }
                | Part::Scale { linear: Linear::Key | Linear::Value, .. } => plan.kv_replicas(),
                // All of it, and scales whose rows are not split.
                Part::LayerNorm { .. }
                | Part::FinalNorm
                | Part::Scale { linear: Linear::Output | Linear::Down, .. } => tensor,
                Part::Embedding if tied && pipeline > 1 => 2,
                _ => 1,
            } as u64;
            let expected: u64 =
                tensors.iter().map(|stored| stored.bytes() * times(Part::of(&config, &stored.name))).sum();
            prop_assert_eq!(bytes.iter().sum::<u64>(), expected);
        }
    }
}
