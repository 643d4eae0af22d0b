//! LlamaPool -> gangs to make and to remove.

use std::cmp::Reverse;

use herd_api::condition::reason;
use herd_api::{GangFailure, GangPhase, Target};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::backoff::{failure, retry_at};
use crate::gang::{Gang, PodId, Trouble};

/// Gangs made in one pass; the next pass makes the next ones.
const MAX_CREATE: usize = 32;
/// A gang of which some pods have nodes and others find none gives up what it holds this long after it was made, and this
/// long after the last one of its pool did: what that one held may be what it lacks.
const WHOLE_WITHIN: SignedDuration = SignedDuration::from_mins(1);
/// A leader that is deleted is gone by the end of its grace period, unless its node is; this much later the others do not
/// wait for it any more.
const LEADER_OVERDUE: SignedDuration = SignedDuration::from_secs(30);

/// What there is of a pool.
#[derive(Clone, Copy, Debug)]
pub struct ObservedPool<'a> {
    /// Tells one pool from another.
    pub uid: &'a str,
    /// How many gangs of which revision.
    pub targets: &'a [Target],
    /// Those there are.
    pub gangs: &'a [Gang],
    /// The last one that was given up, see the pool's status.
    pub last_failure: Option<&'a GangFailure>,
}

/// What to do about the gangs of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolPlan {
    /// A revision a gang to make.
    pub create: Vec<String>,
    /// Gangs to remove.
    pub delete: Vec<Deletion>,
    /// Pods that are left of gangs that went.
    pub left: Vec<PodId>,
    /// The last gang that was given up, with this plan or before: to be kept in the status before anything is deleted.
    pub last_failure: Option<GangFailure>,
    /// Plan again this long from now, even if nothing changes.
    pub again_in: Option<SignedDuration>,
}

/// A gang to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// Its id.
    pub gang: String,
    /// The pods to begin with, in this order: the leader alone where it may have requests to end, for which it needs the
    /// others.
    pub pods: Vec<PodId>,
    /// Why, for the event.
    pub why: &'static str,
}

/// Plans towards the targets. Gangs that drain are as good as gone. Gangs of other revisions serve until those of the targets
/// are Ready; those that are not Ready go at once. A gang that has lost a pod goes as a whole.
pub fn plan_pool(observed: ObservedPool<'_>, now: Timestamp) -> PoolPlan {
    let ObservedPool { uid, targets, gangs, last_failure } = observed;
    let mut plan = PoolPlan { last_failure: last_failure.cloned(), ..PoolPlan::default() };
    let is_wanted = |gang: &Gang| targets.iter().any(|target| target.revision == gang.revision);
    for gang in gangs {
        match gang.phase {
            GangPhase::Draining => clean_up(gang, now, &mut plan),
            // What an earlier revision does says nothing about the next gang.
            GangPhase::Failed => plan.delete.push(all_at_once(gang, "a pod of it is lost")),
            _ => {}
        }
        if let (GangPhase::Failed, true, Some(trouble)) = (gang.phase, is_wanted(gang), &gang.trouble) {
            plan.give_up(gang, trouble, now);
        }
    }
    release(gangs.iter().filter(|gang| is_wanted(gang)), now, &mut plan);
    let given_up: Vec<&str> = plan.delete.iter().map(|deletion| deletion.gang.as_str()).collect();
    let live: Vec<&Gang> = gangs
        .iter()
        .filter(|gang| !matches!(gang.phase, GangPhase::Draining | GangPhase::Failed))
        .filter(|gang| !given_up.contains(&gang.id.as_str()))
        .collect();
    let (mut wanted, mut ready) = (0, 0);
    for Target { revision, replicas } in targets {
        let replicas = usize::try_from(*replicas).unwrap_or(0);
        let mut live: Vec<&Gang> = live.iter().copied().filter(|gang| gang.revision == *revision).collect();
        let missing = replicas.saturating_sub(live.len());
        create(revision, missing, uid, now, &mut plan);
        // The least worth first: what is not Ready, then the youngest.
        live.sort_by_key(|gang| (gang.phase == GangPhase::Ready, Reverse(gang.created), gang.id.clone()));
        let surplus = live.len().saturating_sub(replicas);
        plan.delete.extend(live[..surplus].iter().map(|gang| orderly(gang, "there are more than wanted")));
        wanted += replicas;
        ready += live[surplus..].iter().filter(|gang| gang.phase == GangPhase::Ready).count();
    }
    if plan.create.len() > MAX_CREATE {
        plan.create.truncate(MAX_CREATE);
        plan.again_in = Some(SignedDuration::ZERO);
    }
    for gang in live.iter().filter(|gang| !is_wanted(gang)) {
        let why = match gang.phase {
            GangPhase::Ready if ready < wanted => continue,
            GangPhase::Ready => "its revision is replaced",
            _ => "its revision is replaced and it was not Ready",
        };
        plan.delete.push(orderly(gang, why));
    }
    plan
}

impl PoolPlan {
    fn give_up(&mut self, gang: &Gang, trouble: &Trouble, now: Timestamp) {
        // What it lacks was refused: that it lacks it says less.
        let is_said = self.last_failure.as_ref().is_some_and(|failure| {
            failure.revision == gang.revision && failure.reason == reason::FAILED_CREATE
        });
        if is_said && trouble.reason == reason::GANG_INCOMPLETE {
            return;
        }
        self.last_failure = Some(failure(self.last_failure.as_ref(), &gang.revision, trouble, now));
    }

    fn look_again_at(&mut self, time: Timestamp, now: Timestamp) {
        let wait = time.duration_since(now).max(SignedDuration::ZERO);
        self.again_in = Some(self.again_in.map_or(wait, |soonest| soonest.min(wait)));
    }
}

/// New gangs, once the last one of the revision that was given up is long enough ago.
fn create(revision: &str, missing: usize, pool: &str, now: Timestamp, plan: &mut PoolPlan) {
    let failed = plan.last_failure.as_ref().filter(|failure| failure.revision == revision);
    match failed.map(|failure| retry_at(failure, pool)).filter(|time| *time > now) {
        Some(time) if missing > 0 => plan.look_again_at(time, now),
        Some(_) => {}
        None => plan.create.extend(std::iter::repeat_n(revision.to_owned(), missing)),
    }
}

/// The leader first, so that it ends what it runs; the others once it is gone.
fn orderly(gang: &Gang, why: &'static str) -> Deletion {
    let leader = gang.pods.iter().take(1).map(|pod| pod.id.clone()).collect();
    Deletion { gang: gang.id.clone(), pods: leader, why }
}

/// Where there is nothing that they could end.
fn all_at_once(gang: &Gang, why: &'static str) -> Deletion {
    let pods = gang.pods.iter().map(|pod| pod.id.clone()).collect();
    Deletion { gang: gang.id.clone(), pods, why }
}

/// What a gang that goes still needs: its leader deleted, where only a follower is; the others, once the leader is gone.
fn clean_up(gang: &Gang, now: Timestamp, plan: &mut PoolPlan) {
    let mut stay = gang.pods.iter().filter(|pod| !pod.is_going()).peekable();
    if stay.peek().is_none() {
        return;
    }
    match gang.leader().map(|leader| leader.gone_by) {
        Some(None) => plan.delete.push(orderly(gang, "a pod of it goes")),
        Some(Some(gone_by)) if now.duration_since(gone_by) < LEADER_OVERDUE => {
            plan.look_again_at(gone_by.saturating_add(LEADER_OVERDUE).unwrap_or(Timestamp::MAX), now);
        }
        Some(Some(_)) | None => plan.left.extend(stay.map(|pod| pod.id.clone())),
    }
}

/// Gives up at most one gang that holds room on nodes and finds no more: two of them would wait for each other for ever. The
/// youngest, so that an older one may find what it lacks.
fn release<'a>(gangs: impl Iterator<Item = &'a Gang>, now: Timestamp, plan: &mut PoolPlan) {
    let half = gangs.filter(|gang| !matches!(gang.phase, GangPhase::Draining | GangPhase::Failed));
    let half = half.filter_map(|gang| gang.half_scheduled().map(|trouble| (gang, trouble)));
    let Some((gang, trouble)) = half.max_by_key(|(gang, _)| (gang.created, &gang.id)) else { return };
    let released = plan.last_failure.as_ref().filter(|failure| failure.reason == reason::UNSCHEDULABLE);
    let since = released.map_or(gang.created, |failure| failure.time.0.max(gang.created));
    let deadline = since.saturating_add(WHOLE_WITHIN).unwrap_or(Timestamp::MAX);
    if deadline > now {
        return plan.look_again_at(deadline, now);
    }
    let mut trouble = trouble.clone();
    let (pods, held) = (gang.pods.len(), gang.pods.iter().filter(|pod| pod.has_node).count());
    trouble.message = format!("only {held} of the {pods} pods of a gang found a node: {}", trouble.message);
    plan.give_up(gang, &trouble, now);
    plan.delete.push(all_at_once(gang, "not all of its pods found a node in time"));
}
