//! LlamaPool -> gangs to make and to remove.

use std::cmp::Reverse;

use herd_api::{GangPhase, Target};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::gang::Gang;

/// A gang whose pod is lost is replaced this long after it was made at the earliest: a node that kills every pod at once is
/// asked six times a minute and not a hundred.
const REPLACE_AFTER: SignedDuration = SignedDuration::from_secs(10);

/// Gangs made in one pass; the next pass makes the next ones.
const MAX_CREATE: usize = 32;

/// What to do about the gangs of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolPlan {
    /// A revision a gang to make.
    pub create: Vec<String>,
    /// Gangs to remove.
    pub delete: Vec<Deletion>,
    /// Plan again this long from now, even if nothing changes.
    pub again_in: Option<SignedDuration>,
}

/// A gang to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// Its id.
    pub gang: String,
    /// Why, for the event.
    pub why: &'static str,
}

/// Plans towards `targets`. Gangs that drain are as good as gone. Gangs of other revisions serve until those of the targets
/// are Ready; those that are not Ready go at once.
pub fn plan_pool(targets: &[Target], gangs: &[Gang], now: Timestamp) -> PoolPlan {
    let mut plan = PoolPlan::default();
    let (mut wanted, mut ready) = (0, 0);
    for Target { revision, replicas } in targets {
        let replicas = usize::try_from(*replicas).unwrap_or(0);
        let mut live: Vec<&Gang> = of_revision(gangs, revision).filter(|gang| is_live(gang)).collect();
        let mut waiting = 0;
        for gang in of_revision(gangs, revision).filter(|gang| gang.phase == GangPhase::Failed) {
            let left = REPLACE_AFTER - now.duration_since(gang.created);
            if left > SignedDuration::ZERO {
                waiting += 1;
                plan.again_in = Some(plan.again_in.map_or(left, |soonest| soonest.min(left)));
            } else {
                plan.delete.push(Deletion { gang: gang.id.clone(), why: "its pod is lost" });
            }
        }
        let missing = replicas.saturating_sub(live.len() + waiting);
        plan.create.extend(std::iter::repeat_n(revision.clone(), missing));
        // The least worth first: what is not Ready, then the youngest.
        live.sort_by_key(|gang| (gang.phase == GangPhase::Ready, Reverse(gang.created), gang.id.clone()));
        let surplus = live.len().saturating_sub(replicas);
        for gang in &live[..surplus] {
            plan.delete.push(Deletion { gang: gang.id.clone(), why: "there are more than wanted" });
        }
        wanted += replicas;
        ready += live[surplus..].iter().filter(|gang| gang.phase == GangPhase::Ready).count();
    }
    if plan.create.len() > MAX_CREATE {
        plan.create.truncate(MAX_CREATE);
        plan.again_in = Some(SignedDuration::ZERO);
    }
    for gang in gangs.iter().filter(|gang| targets.iter().all(|target| target.revision != gang.revision)) {
        let why = match gang.phase {
            GangPhase::Draining => continue,
            GangPhase::Ready if ready < wanted => continue,
            GangPhase::Ready => "its revision is replaced",
            _ => "its revision is replaced and it was not Ready",
        };
        plan.delete.push(Deletion { gang: gang.id.clone(), why });
    }
    plan
}

fn of_revision<'a>(gangs: &'a [Gang], revision: &'a str) -> impl Iterator<Item = &'a Gang> {
    gangs.iter().filter(move |gang| gang.revision == revision)
}

fn is_live(gang: &Gang) -> bool {
    !matches!(gang.phase, GangPhase::Draining | GangPhase::Failed)
}
