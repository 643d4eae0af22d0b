//! The seven linears of a decoder layer: their names, shapes, and what each rank holds of them.

use std::ops::Range;

use crate::{ModelConfig, RankShard};

/// A linear of a decoder layer. Weights are `[outputs, inputs]`, row-major, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Linear {
    /// Queries of all heads.
    Query,
    /// Keys of all KV heads.
    Key,
    /// Values of all KV heads.
    Value,
    /// From the heads back to the hidden state.
    Output,
    /// The half of the feed-forward network that goes through `SiLU`.
    Gate,
    /// The half it is multiplied with.
    Up,
    /// Back to the hidden state.
    Down,
}

impl Linear {
    /// All of them, in the order a layer uses them.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// `model.layers.{layer}.{part}.{name}_proj`; its tensors are `.weight` and, in FP8, `.weight_scale`.
    pub fn module(self, layer: usize) -> String {
        let name = match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        };
        format!("model.layers.{layer}.{name}")
    }

    /// `[outputs, inputs]` of the whole weight.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let hidden = config.hidden_size;
        match self {
            Self::Query => [config.heads * config.head_dim, hidden],
            Self::Key | Self::Value => [config.kv_heads * config.head_dim, hidden],
            Self::Output => [hidden, config.heads * config.head_dim],
            Self::Gate | Self::Up => [config.intermediate_size, hidden],
            Self::Down => [hidden, config.intermediate_size],
        }
    }

    /// Outputs and inputs a rank holds. Output and down are split by inputs, their results are summed over the ranks; the
    /// others are split by outputs.
    pub fn slice(self, config: &ModelConfig, shard: &RankShard) -> [Range<usize>; 2] {
        let lanes = |heads: &Range<usize>| heads.start * config.head_dim..heads.end * config.head_dim;
        let hidden = 0..config.hidden_size;
        match self {
            Self::Query => [lanes(&shard.query_heads), hidden],
            Self::Key | Self::Value => [lanes(&shard.kv_heads), hidden],
            Self::Output => [hidden, lanes(&shard.query_heads)],
            Self::Gate | Self::Up => [shard.ffn.clone(), hidden],
            Self::Down => [hidden, shard.ffn.clone()],
        }
    }

    /// Whether the checkpoint holds it in FP8.
    pub fn is_fp8(self, config: &ModelConfig, layer: usize) -> bool {
        config.quantization.as_ref().is_some_and(|fp8| fp8.converts(&self.module(layer)))
    }
}
