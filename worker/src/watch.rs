//! `Watch`: load, phase and role, pushed.

use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::stream::unfold;
use herd_engine::EngineLoad;
use herd_proto::internal::v1 as wire;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Status;

use crate::gang::Gang;

/// Between two events at least: a step of a busy engine takes about this long, and each changes the load.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(20);

/// Between two events at most, so that silence means a leader that is gone.
const LONGEST_INTERVAL: Duration = Duration::from_secs(5);

struct Watcher {
    gang: Arc<Gang>,
    load: watch::Receiver<EngineLoad>,
    phase: watch::Receiver<wire::Phase>,
    role: watch::Receiver<wire::Role>,
    sequence: u64,
    last: Option<Instant>,
}

/// The first event comes at once.
pub(crate) fn events(
    gang: &Arc<Gang>,
) -> impl Stream<Item = Result<wire::WatchEvent, Status>> + Send + use<> {
    let watcher = Watcher {
        gang: Arc::clone(gang),
        load: gang.engine.load(),
        phase: gang.admission.watch_phase(),
        role: gang.role.subscribe(),
        sequence: 0,
        last: None,
    };
    unfold(watcher, |mut watcher| async {
        let event = watcher.next().await?;
        Some((Ok(event), watcher))
    })
}

impl Watcher {
    /// `None` when the epoch ends.
    async fn next(&mut self) -> Option<wire::WatchEvent> {
        let over = self.gang.over.clone();
        if let Some(last) = self.last {
            tokio::select! {
                () = over.cancelled() => return None,
                () = async {
                    tokio::select! {
                        // An error is a sender that is gone, with the worker: the stream ends soon.
                        _ = self.load.changed() => {}
                        _ = self.phase.changed() => {}
                        _ = self.role.changed() => {}
                        () = sleep(LONGEST_INTERVAL) => {}
                    }
                    sleep_until(last + SHORTEST_INTERVAL).await;
                } => {}
            }
        }
        self.last = Some(Instant::now());
        self.sequence += 1;
        let EngineLoad { running, waiting, waiting_prompt_tokens, kv_blocks_used } =
            *self.load.borrow_and_update();
        Some(wire::WatchEvent {
            sequence: self.sequence,
            phase: (*self.phase.borrow_and_update()).into(),
            role: (*self.role.borrow_and_update()).into(),
            load: Some(wire::Load {
                running: running as u32,
                waiting: waiting as u32,
                waiting_prompt_tokens: waiting_prompt_tokens as u32,
                kv_blocks_used: kv_blocks_used as u32,
            }),
        })
    }
}
