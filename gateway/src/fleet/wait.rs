//! Waiting for a gang, where a model has none at the moment: its pods have just become Ready, or it restarts in place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{Fleet, Model};
use crate::RequestError;

/// One request's patience with a fleet. Made before the fleet is looked at, so that no change is missed.
pub(crate) struct GangWait {
    changed: watch::Receiver<u64>,
    begun: Instant,
    patience: Duration,
    waiting: Arc<AtomicU32>,
}

/// Counts a request that waits, for as long as it is held.
struct Counted<'a>(&'a AtomicU32);

impl Fleet {
    pub(crate) fn wait(&self, patience: Duration) -> GangWait {
        GangWait {
            changed: self.shared.changed.subscribe(),
            begun: Instant::now(),
            patience,
            waiting: Arc::clone(&self.shared.waiting),
        }
    }

    /// [`Fleet::choose`], which where no gang is ready waits for one for as long as `patience`. It does not wait for room.
    pub(crate) async fn chosen(&self, name: &str, patience: Duration) -> Result<Model, RequestError> {
        let mut wait = self.wait(patience);
        loop {
            match self.choose(name) {
                Err(RequestError::Unavailable(message)) => {
                    if !wait.changed().await {
                        return Err(RequestError::Unavailable(message));
                    }
                }
                decided => return decided,
            }
        }
    }

    /// Requests and choices that wait now.
    pub(crate) fn waiting(&self) -> u32 {
        self.shared.waiting.load(Ordering::Relaxed)
    }
}

impl GangWait {
    /// Resolves once the fleet is not what it was; `false` when there is no patience left.
    pub(crate) async fn changed(&mut self) -> bool {
        let left = self.patience.saturating_sub(self.begun.elapsed());
        if left.is_zero() {
            return false;
        }
        let _counted = Counted::new(&self.waiting);
        matches!(timeout(left, self.changed.changed()).await, Ok(Ok(())))
    }
}

impl<'a> Counted<'a> {
    fn new(waiting: &'a AtomicU32) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
