//! The other processes of a gang as its leader sees them, for one epoch: what they are told, and what they answer.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::plan::Plan as Told;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::transfer::{Outgoing, Progress, Route};

/// For a process to open blocks for KV: it only notes them.
const LAND_DEADLINE: Duration = Duration::from_secs(5);

/// All of them.
#[derive(Debug)]
pub(crate) struct Followers {
    outboxes: Vec<Outbox>,
    sends: AtomicU64,
    awaited: Mutex<HashMap<Awaited, oneshot::Sender<Result<(), String>>>>,
    over: CancellationToken,
    reason: OnceLock<String>,
}

/// Plans on their way to one process.
#[derive(Debug)]
pub(super) struct Outbox {
    pub(super) ranks: Range<usize>,
    pub(super) plans: mpsc::Sender<wire::Plan>,
}

/// What a report answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Awaited {
    /// A transfer, and the first rank of the process.
    Landing(u64, usize),
    Sent(u64),
}

/// What another process of this gang did not do.
#[derive(Debug, thiserror::Error)]
#[error("rank {first_rank} of this gang: {problem}")]
pub(crate) struct FollowerError {
    first_rank: usize,
    problem: String,
}

impl Followers {
    pub(super) fn new(outboxes: Vec<Outbox>) -> Self {
        Self {
            outboxes,
            sends: AtomicU64::new(0),
            awaited: Mutex::default(),
            over: CancellationToken::new(),
            reason: OnceLock::new(),
        }
    }

    /// How many they are.
    pub(crate) fn processes(&self) -> usize {
        self.outboxes.len()
    }

    /// Tells all of them.
    pub(super) fn tell(&self, told: &Told) {
        for outbox in &self.outboxes {
            self.tell_one(outbox, told.clone());
        }
    }

    fn tell_one(&self, outbox: &Outbox, told: Told) {
        // One that is full belongs to a process that has stopped reading: its silence is noticed, this is sooner.
        if outbox.plans.try_send(wire::Plan { plan: Some(told) }).is_err() {
            self.end(&format!("rank {} takes no plans", outbox.ranks.start));
        }
    }

    /// Tells all of them to compute a step.
    pub(super) fn step(&self, step: wire::Step) {
        self.tell(&Told::Step(step));
    }

    /// Ends the epoch; the first reason counts.
    pub(super) fn end(&self, reason: &str) {
        if self.reason.set(reason.to_owned()).is_ok() {
            let end = wire::Plan { plan: Some(Told::End(wire::End { reason: reason.to_owned() })) };
            for outbox in &self.outboxes {
                // One that does not hear it sees its connections close.
                let _ = outbox.plans.try_send(end.clone());
            }
            self.lock().clear();
            self.over.cancel();
        }
    }

    /// Resolves with the reason once the epoch is over.
    pub(super) async fn ended(&self) -> String {
        self.over.cancelled().await;
        self.reason.get().cloned().unwrap_or_default()
    }

    /// Takes in what a process answers.
    pub(super) fn answered(&self, first_rank: usize, report: wire::rank_report::Report) {
        use wire::rank_report::Report;
        let (awaited, answer) = match report {
            Report::Landing(wire::KvLanding { transfer }) => (Awaited::Landing(transfer, first_rank), Ok(())),
            Report::Sent(wire::KvSent { id, error }) if error.is_empty() => (Awaited::Sent(id), Ok(())),
            Report::Sent(wire::KvSent { id, error }) => (Awaited::Sent(id), Err(error)),
            Report::Failed(wire::Failed { reason }) => {
                return self.end(&format!("rank {first_rank}: {reason}"));
            }
            Report::Hello(_) | Report::Connected(_) | Report::Alive(_) => return,
        };
        if let Some(asker) = self.lock().remove(&awaited) {
            // An asker that is gone has given up.
            let _ = asker.send(answer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Awaited, oneshot::Sender<Result<(), String>>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&self, awaited: Awaited) -> oneshot::Receiver<Result<(), String>> {
        let (sender, answer) = oneshot::channel();
        self.lock().insert(awaited, sender);
        // Whoever waits for an epoch that is over hears so at once.
        if self.reason.get().is_some() {
            self.lock().clear();
        }
        answer
    }

    /// Opens blocks for the KV of a prompt in all of them; returns when frames are welcome everywhere.
    pub(crate) async fn land(
        &self,
        transfer: u64,
        prompt_tokens: usize,
        blocks: &[u32],
    ) -> Result<(), FollowerError> {
        let answers: Vec<_> = self
            .outboxes
            .iter()
            .map(|outbox| (outbox.ranks.start, self.wait_for(Awaited::Landing(transfer, outbox.ranks.start))))
            .collect();
        let land = wire::LandKv { transfer, prompt_tokens: prompt_tokens as u32, blocks: blocks.to_vec() };
        self.tell(&Told::Land(land));
        for (first_rank, answer) in answers {
            let failed = |problem: &str| FollowerError { first_rank, problem: problem.to_owned() };
            match timeout(LAND_DEADLINE, answer).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(problem))) => return Err(failed(&problem)),
                Ok(Err(_)) => return Err(failed("the epoch is over")),
                Err(_) => return Err(failed("opens no blocks for KV")),
            }
        }
        Ok(())
    }

    /// Ends what [`Self::land`] began. It stands before every later step in what the processes are told, so its blocks may be
    /// given to others as soon as this has returned.
    pub(crate) fn close(&self, transfer: u64, complete: bool) {
        for outbox in &self.outboxes {
            self.lock().remove(&Awaited::Landing(transfer, outbox.ranks.start));
        }
        self.tell(&Told::Close(wire::CloseKv { transfer, complete }));
    }

    /// Which process has a rank; none: this one.
    pub(crate) fn of_rank(&self, rank: usize) -> Option<usize> {
        self.outboxes.iter().position(|outbox| outbox.ranks.contains(&rank))
    }

    /// Has a process send what its ranks hold of a prompt, as fast as it is computed. Dropped, it is cancelled: no block is
    /// read after the next step has begun.
    pub(crate) async fn send(
        &self,
        process: usize,
        routes: &[Route],
        outgoing: &Outgoing,
        mut progress: Progress,
    ) -> Result<(), FollowerError> {
        let Some(outbox) = self.outboxes.get(process) else { return Ok(()) };
        let Outgoing { transfer, epoch, prompt_tokens, blocks, .. } = outgoing;
        let id = self.sends.fetch_add(1, Ordering::Relaxed);
        let mut sent = self.wait_for(Awaited::Sent(id));
        let cancel = CancelSend { followers: self, outbox, id };
        let told = Told::Send(wire::SendKv {
            id,
            transfer: *transfer,
            epoch: *epoch,
            prompt_tokens: *prompt_tokens as u32,
            blocks: blocks.to_vec(),
            routes: routes.iter().map(route).collect(),
        });
        self.tell_one(outbox, told);
        let mut computes = true;
        let answer = loop {
            tokio::select! {
                answer = &mut sent => break answer,
                changed = progress.changed(), if computes => {
                    // A prompt that ends early drops this future.
                    computes = changed.is_ok();
                    let computed = *progress.borrow_and_update() as u32;
                    self.tell_one(outbox, Told::Progress(wire::KvProgress { id, computed }));
                }
            }
        };
        drop(cancel);
        let failed = |problem: String| FollowerError { first_rank: outbox.ranks.start, problem };
        answer.unwrap_or_else(|_| Err("the epoch is over".to_owned())).map_err(failed)
    }
}

fn route(route: &Route) -> wire::KvRoute {
    let Route { endpoint, source_rank, target_rank, layers, heads } = route;
    wire::KvRoute {
        endpoint: endpoint.clone(),
        source_rank: u32::from(*source_rank),
        target_rank: u32::from(*target_rank),
        first_head: heads.start as u32,
        heads: heads.len() as u32,
        first_layer: layers.start as u32,
        layers: layers.len() as u32,
    }
}

/// Ends a send however it ends.
struct CancelSend<'a> {
    followers: &'a Followers,
    outbox: &'a Outbox,
    id: u64,
}

impl Drop for CancelSend<'_> {
    fn drop(&mut self) {
        let Self { followers, outbox, id } = self;
        followers.lock().remove(&Awaited::Sent(*id));
        followers.tell_one(outbox, Told::Cancel(wire::CancelKv { id: *id }));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use herd_proto::internal::v1::rank_report::Report;

    use super::*;

    fn two() -> (Arc<Followers>, Vec<mpsc::Receiver<wire::Plan>>) {
        let (outboxes, plans) = [1..2, 2..4]
            .map(|ranks| {
                let (sender, plans) = mpsc::channel(8);
                (Outbox { ranks, plans: sender }, plans)
            })
            .into_iter()
            .unzip();
        (Arc::new(Followers::new(outboxes)), plans)
    }

    fn next(plans: &mut mpsc::Receiver<wire::Plan>) -> Told {
        plans.try_recv().unwrap().plan.unwrap()
    }

    #[tokio::test]
    async fn blocks_are_open_when_all_have_opened_them() {
        let (followers, mut plans) = two();
        let land = followers.land(7, 100, &[3, 4]);
        tokio::pin!(land);
        assert!(futures::poll!(&mut land).is_pending());
        for plans in &mut plans {
            assert!(matches!(next(plans), Told::Land(wire::LandKv { transfer: 7, .. })));
        }
        followers.answered(2, Report::Landing(wire::KvLanding { transfer: 7 }));
        assert!(futures::poll!(&mut land).is_pending());
        followers.answered(1, Report::Landing(wire::KvLanding { transfer: 7 }));
        land.await.unwrap();
    }

    #[tokio::test]
    async fn a_send_that_is_given_up_is_cancelled() {
        let (followers, mut plans) = two();
        let outgoing = crate::transfer::Outgoing {
            transfer: 7,
            epoch: 9,
            fingerprint: String::new(),
            dtype: herd_model::Dtype::F32,
            block_tokens: 64,
            prompt_tokens: 3,
            blocks: [1].into(),
        };
        let (computed, progress) = tokio::sync::watch::channel(0);
        {
            let send = followers.send(followers.of_rank(3).unwrap(), &[], &outgoing, progress.clone());
            tokio::pin!(send);
            assert!(futures::poll!(&mut send).is_pending());
            computed.send_replace(3);
            assert!(futures::poll!(&mut send).is_pending());
        }
        assert!(matches!(next(&mut plans[1]), Told::Send(wire::SendKv { id: 0, .. })));
        assert!(matches!(next(&mut plans[1]), Told::Progress(wire::KvProgress { id: 0, computed: 3 })));
        assert!(matches!(next(&mut plans[1]), Told::Cancel(wire::CancelKv { id: 0 })));
        assert!(followers.lock().is_empty());
        let send = followers.send(1, &[], &outgoing, progress);
        tokio::pin!(send);
        assert!(futures::poll!(&mut send).is_pending());
        followers.answered(2, Report::Sent(wire::KvSent { id: 1, error: "no route".to_owned() }));
        assert!(send.await.unwrap_err().to_string().ends_with("no route"));
    }

    #[tokio::test]
    async fn the_end_is_told_once_and_ends_what_waits() {
        let (followers, mut plans) = two();
        let land = followers.land(7, 1, &[]);
        tokio::pin!(land);
        assert!(futures::poll!(&mut land).is_pending());
        followers.answered(2, Report::Failed(wire::Failed { reason: "out of memory".to_owned() }));
        followers.end("something later");
        assert_eq!(followers.ended().await, "rank 2: out of memory");
        assert!(land.await.is_err());
        assert!(followers.land(8, 1, &[]).await.is_err(), "nothing waits for an epoch that is over");
        next(&mut plans[0]);
        assert!(matches!(next(&mut plans[0]), Told::End(_)));
    }
}
