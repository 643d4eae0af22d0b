//! Waiting for a gang, where a model has none at the moment: its pods have just become Ready, or it restarts in place.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use herd_metrics::OTHER_MODELS;
use herd_routing::Refusal;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{Fleet, Model};
use crate::RequestError;

/// Requests, or choices of one, that wait, by model.
#[derive(Debug, Default)]
pub(super) struct Waiting(Mutex<BTreeMap<String, u32>>);

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request's patience with a fleet. Made before the fleet is looked at, so that no change is missed.
pub(crate) struct GangWait<'a> {
    fleet: &'a Fleet,
    model: &'a str,
    changed: watch::Receiver<u64>,
    begun: Instant,
    patience: Duration,
}

/// Counts a request that waits, for as long as it is held.
struct Counted {
    waiting: Arc<Waiting>,
    model: String,
}

/// A model that was not chosen.
#[derive(Debug)]
pub(crate) struct NotChosen {
    pub(crate) error: RequestError,
    /// Where it is the gangs' state.
    pub(crate) refusal: Option<Refusal>,
}

impl From<RequestError> for NotChosen {
    fn from(error: RequestError) -> Self {
        Self { error, refusal: None }
    }
}

impl Fleet {
    pub(crate) fn wait<'a>(&'a self, model: &'a str, patience: Duration) -> GangWait<'a> {
        let changed = self.shared.changed.subscribe();
        GangWait { fleet: self, model, changed, begun: Instant::now(), patience }
    }

    /// [`Fleet::choose`], which where no gang is ready waits for one for as long as `patience`. It does not wait for room.
    pub(crate) async fn chosen(&self, name: &str, patience: Duration) -> Result<Model, NotChosen> {
        let mut wait = self.wait(name, patience);
        loop {
            match self.choose(name) {
                Err(not_chosen @ NotChosen { error: RequestError::Unavailable(_), .. }) => {
                    if !wait.changed().await {
                        return Err(not_chosen);
                    }
                }
                decided => return decided,
            }
        }
    }

    /// Requests and choices that wait now, by model.
    pub(crate) fn waiting(&self) -> BTreeMap<String, u32> {
        self.shared.waiting.lock().clone()
    }
}

impl GangWait<'_> {
    /// Resolves once the fleet is not what it was; `false` when there is no patience left.
    pub(crate) async fn changed(&mut self) -> bool {
        let left = self.patience.saturating_sub(self.begun.elapsed());
        if left.is_zero() {
            return false;
        }
        let _counted = Counted::new(self.fleet, self.model);
        matches!(timeout(left, self.changed.changed()).await, Ok(Ok(())))
    }
}

impl Counted {
    fn new(fleet: &Fleet, model: &str) -> Self {
        // While the fleet is not known yet, a name is whatever a client says.
        let model = if fleet.serves(model) { model } else { OTHER_MODELS };
        *fleet.shared.waiting.lock().entry(model.to_owned()).or_default() += 1;
        Self { waiting: Arc::clone(&fleet.shared.waiting), model: model.to_owned() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock();
        if let Some(count) = waiting.get_mut(&self.model) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.model);
            }
        }
    }
}
