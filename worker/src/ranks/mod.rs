//! A gang of several processes: each holds some of the ranks, and together they hold one copy of the model.
//!
//! The leader is the process with rank 0. Every other process, a follower, calls `Rank.Join` on it and says what it has
//! loaded. When all are there the leader begins an epoch: the processes connect to each other, the leader sends the plan of
//! each step to all in one ordered stream, and their ranks compute it together: those of a stage side by side, a stage after
//! the one before. Weights stay loaded from one epoch to the
//! next; KV and sequences do not. An error, a connection that breaks or [`SILENCE`] anywhere ends the epoch everywhere.

mod connect;
mod executor;
mod follower;
mod followers;
mod frame;
mod join;
mod leader;
mod mesh;
mod plan;

use std::ops::Range;
use std::time::Duration;

pub use follower::Follower;
pub(crate) use followers::Followers;
pub(crate) use join::{Expected, RankService};
pub(crate) use leader::Leader;

use herd_model::{ModelConfig, ShardPlan};

/// Of hellos and frames between ranks.
const PROTOCOL_VERSION: u16 = 1;

/// Each side of a `Join` says something this often.
const ALIVE_PERIOD: Duration = Duration::from_millis(500);

/// A side that says nothing for this long is gone. The epoch is to be over everywhere within 5 s of a process that stops.
const SILENCE: Duration = Duration::from_secs(4);

/// Plans and reports that the other side has not taken yet. It always takes them at once.
const MESSAGES: usize = 1024;

/// The most values that a rank gives at once: a step's hidden states, or its columns of a step's logits.
fn max_values(config: &ModelConfig, shards: &ShardPlan, step_tokens: usize) -> usize {
    let columns = shards.ranks().iter().map(|shard| shard.vocab.len()).max().unwrap_or(0);
    step_tokens.saturating_mul(config.hidden_size.max(columns)).min(u32::MAX as usize)
}

fn span(first: u32, count: u32) -> Range<usize> {
    let first = first as usize;
    first..first.saturating_add(count as usize)
}
