//! Which rank sends which KV heads to which rank when KV moves between gangs of one model.

use std::ops::Range;

use crate::ShardPlan;

/// KV that goes from one rank of the source gang to one rank of the target gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvRoute {
    /// Rank of the gang that holds the KV.
    pub source_rank: usize,
    /// Rank of the gang that receives it.
    pub target_rank: usize,
    /// Absolute layers.
    pub layers: Range<usize>,
    /// Absolute KV heads.
    pub heads: Range<usize>,
}

/// Routes by target rank, then by layers and heads: every layer and head of every target rank exactly once. Where several
/// source ranks hold a head, the target ranks that need it take turns. Both plans are of the same model.
pub fn kv_routes(source: &ShardPlan, target: &ShardPlan) -> Vec<KvRoute> {
    let replicas = source.kv_replicas();
    let mut routes = Vec::new();
    for receiver in target.ranks() {
        // Of the ranks of a target stage that hold the same heads, which one this is.
        let turn = receiver.tensor_rank % target.kv_replicas();
        // `tensor` is a multiple of `replicas`: no chunk spans two stages.
        for holders in source.ranks().chunks(replicas) {
            let layers = common(&holders[0].layers, &receiver.layers);
            let heads = common(&holders[0].kv_heads, &receiver.kv_heads);
            if !layers.is_empty() && !heads.is_empty() {
                let source_rank = holders[turn % replicas].rank;
                routes.push(KvRoute { source_rank, target_rank: receiver.rank, layers, heads });
            }
        }
    }
    routes
}

fn common(one: &Range<usize>, other: &Range<usize>) -> Range<usize> {
    one.start.max(other.start)..one.end.min(other.end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Parallelism;
    use crate::config::tests::any_config;

    fn any_parallelism() -> impl Strategy<Value = Parallelism> {
        (1_usize..=16, 1_usize..=4).prop_map(|(tensor, pipeline)| Parallelism { tensor, pipeline })
    }

    proptest! {
        #[test]
        fn every_layer_and_head_of_every_target_rank_comes_once(
            config in any_config(),
            source in any_parallelism(),
            target in any_parallelism(),
        ) {
            let (Ok(source), Ok(target)) = (ShardPlan::new(&config, source), ShardPlan::new(&config, target)) else {
                return Ok(());
            };
            let routes = kv_routes(&source, &target);
            for receiver in target.ranks() {
                let come: Vec<_> = routes.iter()
                    .filter(|route| route.target_rank == receiver.rank)
                    .flat_map(|route| route.layers.clone().map(move |layer| (layer, route.heads.clone())))
                    .flat_map(|(layer, heads)| heads.map(move |head| (layer, head)))
                    .collect();
                let held: Vec<_> = receiver.layers.clone()
                    .flat_map(|layer| receiver.kv_heads.clone().map(move |head| (layer, head)))
                    .collect();
                let mut sorted = come.clone();
                sorted.sort_unstable();
                prop_assert_eq!(sorted, held);
            }
            for route in &routes {
                let holder = &source.ranks()[route.source_rank];
                prop_assert_eq!(&common(&holder.kv_heads, &route.heads), &route.heads);
                prop_assert_eq!(&common(&holder.layers, &route.layers), &route.layers);
            }
            // Equal degrees send rank to rank.
            if source == target {
                prop_assert!(routes.iter().all(|route| route.source_rank == route.target_rank));
            }
        }
    }
}
