//! What a person would want to be told when a status changes.

use herd_api::condition::{self, reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// An Event to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Something is wrong.
    pub warning: bool,
    /// Of the condition.
    pub reason: String,
    /// Of the condition.
    pub message: String,
}

/// One for each condition that changed to something that is news.
pub fn notes(before: &[Condition], after: &[Condition]) -> Vec<Note> {
    let mut notes: Vec<Note> = Vec::new();
    for condition in after {
        let old = before.iter().find(|old| old.type_ == condition.type_);
        let same = old.is_some_and(|old| old.status == condition.status && old.reason == condition.reason);
        let is_routine = ROUTINE.contains(&condition.reason.as_str());
        let told = notes.iter().any(|note| note.reason == condition.reason);
        if same || is_routine || told {
            continue;
        }
        notes.push(Note {
            warning: is_bad(condition),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
        });
    }
    notes
}

/// What every object goes through.
const ROUTINE: [&str; 10] = [
    reason::AS_EXPECTED,
    reason::NO_GANG_READY,
    reason::SOME_GANGS_READY,
    reason::GANGS_CHANGING,
    reason::UNKNOWN,
    reason::RESOLVING,
    reason::DOWNLOADING,
    reason::LOADING,
    reason::LOADED,
    reason::WITHIN_BOUNDS,
];

fn is_bad(condition: &Condition) -> bool {
    match condition.type_.as_str() {
        condition::READY
        | condition::SCHEDULED
        | condition::MODEL_AVAILABLE
        | condition::METRICS_AVAILABLE => condition.status == "False",
        condition::DEGRADED | condition::SCALING_LIMITED => condition.status == "True",
        _ => false,
    }
}
