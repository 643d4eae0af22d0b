//! Which slice of a model each rank holds.

use std::ops::Range;

use crate::ModelConfig;

/// Ranges of the feed-forward network and the vocabulary start at multiples of this where the model's size is one: what
/// packed weights and FP8 matrix units want.
const GRAIN: usize = 16;

/// How many ranks a model is split over: `tensor` times `pipeline`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallelism {
    /// Ranks that share each layer.
    pub tensor: usize,
    /// Stages that the layers are split over.
    pub pipeline: usize,
}

impl Parallelism {
    /// One stage.
    pub fn tensor(tensor: usize) -> Self {
        Self { tensor, pipeline: 1 }
    }

    /// Ranks of a gang.
    pub fn ranks(self) -> usize {
        self.tensor.saturating_mul(self.pipeline)
    }
}

/// How one model is split over the ranks of a gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    ranks: Vec<RankShard>,
    parallelism: Parallelism,
    kv_heads: usize,
}

/// The slice of one rank. Layers tile the model over the stages. Query heads, feed-forward lanes and vocabulary tile it over
/// the ranks of a stage; KV heads do too until there are more ranks than KV heads, then each is held by `tensor / kv_heads`
/// ranks in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankShard {
    /// Counted from 0, stage by stage: `stage * tensor + tensor_rank`.
    pub rank: usize,
    /// Counted from 0.
    pub stage: usize,
    /// Its number in the stage.
    pub tensor_rank: usize,
    /// Absolute decoder layers.
    pub layers: Range<usize>,
    /// Absolute attention heads.
    pub query_heads: Range<usize>,
    /// Absolute KV heads: those that the query heads attend to.
    pub kv_heads: Range<usize>,
    /// Lanes of the feed-forward network.
    pub ffn: Range<usize>,
    /// Rows of the embedding, where the stage is the first one, and of the output head, where it is the last.
    pub vocab: Range<usize>,
}

/// A degree that does not split this model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// Heads that do not divide.
    #[error(
        "tensor {tensor} cannot split {heads} attention heads and {kv_heads} kv heads of this model; possible degrees: {}",
        list(.possible)
    )]
    Tensor {
        /// Asked for.
        tensor: usize,
        /// Attention heads of the model.
        heads: usize,
        /// KV heads of the model.
        kv_heads: usize,
        /// Degrees that do split it, rising.
        possible: Vec<usize>,
    },
    /// Stages without a layer.
    #[error("pipeline {pipeline} cannot split the {layers} layers of this model; possible are 1 to {layers}")]
    Pipeline {
        /// Asked for.
        pipeline: usize,
        /// Of the model.
        layers: usize,
    },
}

fn list(degrees: &[usize]) -> String {
    degrees.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl ShardPlan {
    /// Splits a model, so that each rank has a whole number of heads and of layers.
    pub fn new(config: &ModelConfig, parallelism: Parallelism) -> Result<Self, ShardError> {
        let &ModelConfig { heads, kv_heads, intermediate_size, vocab_size, layers, .. } = config;
        let Parallelism { tensor, pipeline } = parallelism;
        if !splits(config, tensor) {
            let possible = (1..=heads).filter(|&degree| splits(config, degree)).collect();
            return Err(ShardError::Tensor { tensor, heads, kv_heads, possible });
        }
        if pipeline == 0 || pipeline > layers {
            return Err(ShardError::Pipeline { pipeline, layers });
        }
        let ranks = (0..parallelism.ranks())
            .map(|rank| {
                let (stage, tensor_rank) = (rank / tensor, rank % tensor);
                let first_kv = tensor_rank * kv_heads / tensor;
                let kv_end =
                    if tensor > kv_heads { first_kv + 1 } else { (tensor_rank + 1) * kv_heads / tensor };
                RankShard {
                    rank,
                    stage,
                    tensor_rank,
                    layers: stage_layers(layers, stage, pipeline),
                    query_heads: part(heads, 1, tensor_rank, tensor),
                    kv_heads: first_kv..kv_end,
                    ffn: part(intermediate_size, grain(intermediate_size), tensor_rank, tensor),
                    vocab: part(vocab_size, grain(vocab_size), tensor_rank, tensor),
                }
            })
            .collect();
        Ok(Self { ranks, parallelism, kv_heads })
    }

    /// The degrees.
    pub fn parallelism(&self) -> Parallelism {
        self.parallelism
    }

    /// The tensor degree.
    pub fn tensor(&self) -> usize {
        self.parallelism.tensor
    }

    /// Whether a stage computes the logits.
    pub fn is_last(&self, stage: usize) -> bool {
        stage + 1 == self.parallelism.pipeline
    }

    /// The ranks of a stage.
    pub fn stage(&self, stage: usize) -> &[RankShard] {
        self.ranks.chunks(self.parallelism.tensor).nth(stage).unwrap_or_default()
    }

    /// The slices, by rank.
    pub fn ranks(&self) -> &[RankShard] {
        &self.ranks
    }

    /// Ranks of a stage that hold each KV head.
    pub fn kv_replicas(&self) -> usize {
        (self.tensor() / self.kv_heads).max(1)
    }
}

/// The layers of one of `stages`, counted from 0.
pub(crate) fn stage_layers(layers: usize, stage: usize, stages: usize) -> Range<usize> {
    part(layers, 1, stage, stages)
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
            ShardPlan::new(&config, Parallelism::tensor(2)).unwrap_err().to_string(),
            "tensor 2 cannot split 9 attention heads and 3 kv heads of this model; possible degrees: 1, 3, 9"
        );
        assert!(ShardPlan::new(&config, Parallelism::tensor(0)).is_err());
        assert!(ShardPlan::new(&config, Parallelism::tensor(18)).is_err());
        assert_eq!(ShardPlan::new(&config, Parallelism::tensor(9)).unwrap().kv_replicas(), 3);
        let pipeline = config.layers + 1;
        let refused = ShardPlan::new(&config, Parallelism { tensor: 3, pipeline }).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("pipeline {pipeline} cannot split")), "{refused}");
        assert!(ShardPlan::new(&config, Parallelism { tensor: 3, pipeline: 0 }).is_err());
    }

    proptest! {
        #[test]
        fn slices_tile_the_model(config in any_config(), tensor in 1_usize..=16, pipeline in 1_usize..=4) {
            let parallelism = Parallelism { tensor, pipeline };
            let plan = match ShardPlan::new(&config, parallelism) {
                Ok(plan) => plan,
                Err(ShardError::Tensor { possible, .. }) => {
                    prop_assert!(!possible.contains(&tensor));
                    prop_assert!(possible.contains(&1));
                    return Ok(());
                }
                Err(ShardError::Pipeline { .. }) => {
                    prop_assert!(pipeline > config.layers);
                    return Ok(());
                }
            };
            prop_assert_eq!(plan.ranks().len(), tensor * pipeline);
            prop_assert!(plan.ranks().iter().enumerate().all(|(rank, shard)| shard.rank == rank));
            let stages: Vec<_> = (0..pipeline).map(|stage| plan.stage(stage)).collect();
            prop_assert!(tiles(stages.iter().map(|ranks| ranks[0].layers.clone()), config.layers));
            for (stage, ranks) in stages.iter().enumerate() {
                prop_assert_eq!(ranks.len(), tensor);
                prop_assert!(ranks.iter().all(|r| r.layers == ranks[0].layers && r.stage == stage));
                prop_assert!(tiles(ranks.iter().map(|r| r.query_heads.clone()), config.heads));
                prop_assert!(tiles(ranks.iter().map(|r| r.ffn.clone()), config.intermediate_size));
                prop_assert!(tiles(ranks.iter().map(|r| r.vocab.clone()), config.vocab_size));
                let first_replicas = ranks.iter().step_by(plan.kv_replicas());
                prop_assert!(tiles(first_replicas.map(|r| r.kv_heads.clone()), config.kv_heads));
            }

            let group = config.heads / config.kv_heads;
            for rank in plan.ranks() {
                let attended: Vec<_> = rank.query_heads.clone().map(|head| head / group).collect();
                prop_assert_eq!(rank.kv_heads.start, attended[0]);
                prop_assert_eq!(rank.kv_heads.end, attended[attended.len() - 1] + 1);
                prop_assert_eq!(rank.query_heads.len() % rank.kv_heads.len(), 0);
            }
            for linear in Linear::ALL {
                let [outputs, inputs] = linear.shape(&config);
                let weights: usize = stages[0].iter()
                    .map(|rank| linear.slice(&config, rank))
                    .map(|[rows, columns]| rows.len() * columns.len())
                    .sum();
                let copies = if matches!(linear, Linear::Key | Linear::Value) { plan.kv_replicas() } else { 1 };
                prop_assert_eq!(weights, outputs * inputs * copies);
            }
        }
    }
}
