//! Which slice of a model each tensor rank holds.

use std::ops::Range;

use crate::ModelConfig;

/// Ranges of the feed-forward network and the vocabulary start at multiples of this where the model's size is one: what
/// packed weights and FP8 matrix units want.
const GRAIN: usize = 16;

/// How one model is split over `tensor` ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    ranks: Vec<RankShard>,
    kv_heads: usize,
}

/// The slice of one rank. Query heads, feed-forward lanes and vocabulary tile the model; KV heads do too until there are
/// more ranks than KV heads, then each is held by `tensor / kv_heads` ranks in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankShard {
    /// Counted from 0.
    pub rank: usize,
    /// Absolute attention heads.
    pub query_heads: Range<usize>,
    /// Absolute KV heads: those that the query heads attend to.
    pub kv_heads: Range<usize>,
    /// Lanes of the feed-forward network.
    pub ffn: Range<usize>,
    /// Rows of the embedding and of the output head.
    pub vocab: Range<usize>,
}

/// A degree that does not split this model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "tensor {tensor} cannot split {heads} attention heads and {kv_heads} kv heads of this model; possible degrees: {}",
    list(.possible)
)]
pub struct ShardError {
    /// Asked for.
    pub tensor: usize,
    /// Attention heads of the model.
    pub heads: usize,
    /// KV heads of the model.
    pub kv_heads: usize,
    /// Degrees that do split it, rising.
    pub possible: Vec<usize>,
}

fn list(degrees: &[usize]) -> String {
    degrees.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl ShardPlan {
    /// Splits a model over `tensor` ranks, each with a whole number of heads.
    pub fn new(config: &ModelConfig, tensor: usize) -> Result<Self, ShardError> {
        let &ModelConfig { heads, kv_heads, intermediate_size, vocab_size, .. } = config;
        if !splits(config, tensor) {
            let possible = (1..=heads).filter(|&degree| splits(config, degree)).collect();
            return Err(ShardError { tensor, heads, kv_heads, possible });
        }
        let ranks = (0..tensor)
            .map(|rank| {
                let first_kv = rank * kv_heads / tensor;
                let kv_end = if tensor > kv_heads { first_kv + 1 } else { (rank + 1) * kv_heads / tensor };
                RankShard {
                    rank,
                    query_heads: part(heads, 1, rank, tensor),
                    kv_heads: first_kv..kv_end,
                    ffn: part(intermediate_size, grain(intermediate_size), rank, tensor),
                    vocab: part(vocab_size, grain(vocab_size), rank, tensor),
                }
            })
            .collect();
        Ok(Self { ranks, kv_heads })
    }

    /// The tensor degree.
    pub fn tensor(&self) -> usize {
        self.ranks.len()
    }

    /// The slices, by rank.
    pub fn ranks(&self) -> &[RankShard] {
        &self.ranks
    }

    /// Ranks that hold each KV head.
    pub fn kv_replicas(&self) -> usize {
        (self.tensor() / self.kv_heads).max(1)
    }
}

fn splits(config: &ModelConfig, tensor: usize) -> bool {
    let &ModelConfig { heads, kv_heads, intermediate_size, vocab_size, .. } = config;
    tensor > 0
        && heads.is_multiple_of(tensor)
        && (kv_heads.is_multiple_of(tensor) || tensor.is_multiple_of(kv_heads))
        && intermediate_size / grain(intermediate_size) >= tensor
        && vocab_size / grain(vocab_size) >= tensor
}

fn grain(size: usize) -> usize {
    if size.is_multiple_of(GRAIN) { GRAIN } else { 1 }
}

fn part(size: usize, grain: usize, rank: usize, ranks: usize) -> Range<usize> {
    let grains = size / grain;
    rank * grains / ranks * grain..(rank + 1) * grains / ranks * grain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Linear;
    use crate::config::tests::{any_config, config_json, parse};

    fn tiles(ranges: impl Iterator<Item = Range<usize>>, size: usize) -> bool {
        let mut end = 0;
        for range in ranges {
            if range.start != end || range.is_empty() {
                return false;
            }
            end = range.end;
        }
        end == size
    }

    #[test]
    fn refusal_names_the_degrees_that_work() {
        let mut json = config_json();
        json["num_attention_heads"] = 9.into();
        json["num_key_value_heads"] = 3.into();
        json["hidden_size"] = 576.into();
        json["intermediate_size"] = 1536.into();
        let config = parse(&json).unwrap();
        assert_eq!(
            ShardPlan::new(&config, 2).unwrap_err().to_string(),
            "tensor 2 cannot split 9 attention heads and 3 kv heads of this model; possible degrees: 1, 3, 9"
        );
        assert!(ShardPlan::new(&config, 0).is_err());
        assert!(ShardPlan::new(&config, 18).is_err());
        assert_eq!(ShardPlan::new(&config, 9).unwrap().kv_replicas(), 3);
    }

    proptest! {
        #[test]
        fn slices_tile_the_model(config in any_config(), tensor in 1_usize..=16) {
            let Ok(plan) = ShardPlan::new(&config, tensor) else {
                let possible = ShardPlan::new(&config, tensor).unwrap_err().possible;
                prop_assert!(!possible.contains(&tensor));
                prop_assert!(possible.contains(&1));
                return Ok(());
            };
            prop_assert_eq!(plan.tensor(), tensor);
            prop_assert!(tiles(plan.ranks().iter().map(|r| r.query_heads.clone()), config.heads));
            prop_assert!(tiles(plan.ranks().iter().map(|r| r.ffn.clone()), config.intermediate_size));
            prop_assert!(tiles(plan.ranks().iter().map(|r| r.vocab.clone()), config.vocab_size));
            let first_replicas = plan.ranks().iter().step_by(plan.kv_replicas());
            prop_assert!(tiles(first_replicas.map(|r| r.kv_heads.clone()), config.kv_heads));

            let group = config.heads / config.kv_heads;
            for rank in plan.ranks() {
                let attended: Vec<_> = rank.query_heads.clone().map(|head| head / group).collect();
                prop_assert_eq!(rank.kv_heads.start, attended[0]);
                prop_assert_eq!(rank.kv_heads.end, attended[attended.len() - 1] + 1);
                prop_assert_eq!(rank.query_heads.len() % rank.kv_heads.len(), 0);
            }
            for linear in Linear::ALL {
                let [outputs, inputs] = linear.shape(&config);
                let weights: usize = plan.ranks().iter()
                    .map(|rank| linear.slice(&config, rank))
                    .map(|[rows, columns]| rows.len() * columns.len())
                    .sum();
                let copies = if matches!(linear, Linear::Key | Linear::Value) { plan.kv_replicas() } else { 1 };
                prop_assert_eq!(weights, outputs * inputs * copies);
            }
        }
    }
}
