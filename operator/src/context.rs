//! What both controllers share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use herd_control::revision::Defaults;
use herd_control::status::Note;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

use crate::autoscale::Verdicts;
use crate::metrics::Metrics;

/// After the first failure of an object in a row, doubled with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_mins(1);
/// Kubernetes keeps this much of an Event's note.
const MAX_NOTE: usize = 1000;
/// For an Event to be written: it is not worth waiting for.
const EVENT_DEADLINE: Duration = Duration::from_secs(5);

/// One for the process.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) defaults: Defaults,
    /// Whether gangs of several pods are scheduled by the cluster's `PodGroup`s.
    pub(crate) pod_groups: bool,
    pub(crate) metrics: Arc<Metrics>,
    /// What the autoscaler says, for whoever writes the status.
    pub(crate) verdicts: Verdicts,
    reporter: Reporter,
    /// Of what goes wrong.
    recorder: Recorder,
    /// Failures in a row, by object; one that is well has no entry.
    failures: Mutex<HashMap<String, u32>>,
}

impl Context {
    pub(crate) fn new(
        client: Client,
        defaults: Defaults,
        pod_groups: bool,
        metrics: Arc<Metrics>,
        identity: String,
    ) -> Self {
        let reporter = Reporter { controller: "herd-operator".to_owned(), instance: Some(identity) };
        Self {
            recorder: Recorder::new(client.clone(), reporter.clone()),
            reporter,
            client,
            defaults,
            pod_groups,
            metrics,
            verdicts: Verdicts::default(),
            failures: Mutex::default(),
        }
    }

    pub(crate) fn is_well(&self, object: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(object);
    }

    /// How long to leave an object alone that failed again.
    pub(crate) fn failed(&self, object: String) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(object).or_insert(0);
        *count = count.saturating_add(1);
        let doubled = 1_u32.checked_shl(*count - 1).unwrap_or(u32::MAX);
        FIRST_RETRY.saturating_mul(doubled).min(LAST_RETRY)
    }

    /// Tells people. An Event that cannot be written is logged, and nothing waits for it.
    ///
    /// A recorder counts what has one reason together, and keeps the words of the first: good for what goes wrong again and
    /// again, not for what is done, each time with other numbers.
    pub(crate) async fn tell(&self, about: &ObjectReference, action: &str, note: Note) {
        let Note { warning, reason, mut message } = note;
        message.truncate(message.floor_char_boundary(MAX_NOTE));
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason,
            note: Some(message),
            action: action.to_owned(),
            secondary: None,
        };
        let published = async {
            if warning {
                self.recorder.publish(&event, about).await
            } else {
                Recorder::new(self.client.clone(), self.reporter.clone()).publish(&event, about).await
            }
        };
        match tokio::time::timeout(EVENT_DEADLINE, published).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(reason = event.reason, "failed to write an event: {error}"),
            Err(_) => tracing::warn!(reason = event.reason, "an event was not written in {EVENT_DEADLINE:?}"),
        }
    }
}
