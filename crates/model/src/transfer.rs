//! Which rank sends which KV heads to which rank when KV moves between gangs of one model.

use std::ops::Range;

use crate::ShardPlan;

/// KV heads that go from one rank of the source gang to one rank of the target gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvRoute {
    /// Tensor rank of the gang that holds the KV.
    pub source_rank: usize,
    /// Tensor rank of the gang that receives it.
    pub target_rank: usize,
    /// Absolute KV heads.
    pub heads: Range<usize>,
}

/// Routes by target rank, then by heads: every head of every target rank exactly once. Where several source ranks hold a
/// head, the target ranks that need it take turns. Both plans are of the same model.
pub fn kv_routes(source: &ShardPlan, target: &ShardPlan) -> Vec<KvRoute> {
    let replicas = source.kv_replicas();
    let mut routes = Vec::new();
    for receiver in target.ranks() {
        // Of the target ranks that hold the same heads, which one this is.
        let turn = receiver.rank % target.kv_replicas();
        for (group, holders) in source.ranks().chunks(replicas).enumerate() {
            let held = &holders[0].kv_heads;
            let heads = held.start.max(receiver.kv_heads.start)..held.end.min(receiver.kv_heads.end);
            if !heads.is_empty() {
                let source_rank = group * replicas + turn % replicas;
                routes.push(KvRoute { source_rank, target_rank: receiver.rank, heads });
            }
        }
    }
    routes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::tests::any_config;

    proptest! {
        #[test]
        fn every_head_of_every_target_rank_comes_once(
            config in any_config(),
            source in 1_usize..=16,
            target in 1_usize..=16,
        ) {
            let (Ok(source), Ok(target)) = (ShardPlan::new(&config, source), ShardPlan::new(&config, target)) else {
                return Ok(());
            };
            let routes = kv_routes(&source, &target);
            for receiver in target.ranks() {
                let heads: Vec<_> = routes.iter()
                    .filter(|route| route.target_rank == receiver.rank)
                    .flat_map(|route| route.heads.clone())
                    .collect();
                prop_assert_eq!(heads, receiver.kv_heads.clone().collect::<Vec<_>>());
            }
            for route in &routes {
                let held = &source.ranks()[route.source_rank].kv_heads;
                prop_assert!(held.start <= route.heads.start && route.heads.end <= held.end);
            }
            // Equal degrees send rank to rank.
            if source == target {
                prop_assert!(routes.iter().all(|route| route.source_rank == route.target_rank));
            }
        }
    }
}
