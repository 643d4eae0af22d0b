//! What the autoscaler has to say in the status of each deployment, which another controller writes.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use herd_api::LastScale;
use herd_api::condition::State;

/// Of one deployment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    /// Once it has looked.
    pub(crate) metrics: Option<State>,
    /// Once it has changed anything.
    pub(crate) last_scale: Option<LastScale>,
}

/// By uid.
#[derive(Debug, Default)]
pub(crate) struct Verdicts(Mutex<HashMap<String, Verdict>>);

impl Verdicts {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Verdict>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, uid: &str) -> Verdict {
        self.lock().get(uid).cloned().unwrap_or_default()
    }

    /// True where it is worth a look at once; other words of the same condition can wait for the next one.
    pub(super) fn put(&self, uid: &str, metrics: State, last_scale: Option<LastScale>) -> bool {
        let mut verdicts = self.lock();
        let verdict = verdicts.entry(uid.to_owned()).or_default();
        let kind = |state: &State| (state.status, state.reason.clone());
        let is_news = last_scale.is_some() || verdict.metrics.as_ref().map(kind) != Some(kind(&metrics));
        verdict.metrics = Some(metrics);
        if last_scale.is_some() {
            verdict.last_scale = last_scale;
        }
        is_news
    }

    /// Forgets all others.
    pub(super) fn keep(&self, uids: &HashSet<String>) {
        self.lock().retain(|uid, _| uids.contains(uid));
    }
}
