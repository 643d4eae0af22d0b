//! Names of objects. They refer to each other, so they are made here and nowhere else.

use crate::Role;

/// LlamaPool of a role.
pub fn pool(deployment: &str, role: Role) -> String {
    format!("{deployment}-{role}")
}

/// `ControllerRevision` that gangs of a revision are made from.
pub fn revision(deployment: &str, revision: &str) -> String {
    format!("{deployment}-{revision}")
}

/// Headless Service of every rank, ready or not.
pub fn ranks_service(deployment: &str) -> String {
    format!("{deployment}-ranks")
}

/// Headless Service of the leaders that are ready.
pub fn leaders_service(deployment: &str) -> String {
    format!("{deployment}-leaders")
}

/// `PodDisruptionBudget` of a role.
pub fn disruption_budget(deployment: &str, role: Role) -> String {
    pool(deployment, role)
}

/// Pod that holds a gang's ranks from `first_rank` on.
pub fn pod(deployment: &str, gang: &str, first_rank: usize) -> String {
    format!("{deployment}-{gang}-{first_rank}")
}

/// Pod that asks a model's source what it has now.
pub fn resolver(deployment: &str, word: &str) -> String {
    format!("{deployment}-{word}-resolve")
}

/// `PodGroup` of a gang of several pods.
pub fn pod_group(deployment: &str, gang: &str) -> String {
    format!("{deployment}-{gang}")
}

/// By which other pods find [`pod`], ready or not.
pub fn pod_host(deployment: &str, namespace: &str, gang: &str, first_rank: usize) -> String {
    format!("{}.{}.{namespace}.svc", pod(deployment, gang, first_rank), ranks_service(deployment))
}
