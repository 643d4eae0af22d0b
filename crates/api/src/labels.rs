//! Labels and annotations. Selectors and objects take them from here alone.

use std::collections::BTreeMap;

use crate::Role;

/// Name of the LlamaDeployment.
pub const DEPLOYMENT: &str = "herd.dev/deployment";
/// What is routed to the gang. Mutable.
pub const ROLE: &str = "herd.dev/role";
/// Id of the gang.
pub const GANG: &str = "herd.dev/gang";
/// Of the pod's first rank.
pub const RANK: &str = "herd.dev/rank";
/// Hash of what the gang was made from.
pub const REVISION: &str = "herd.dev/revision";
/// On Services (and so on their `EndpointSlice`s): which pods of the gangs they lead to.
pub const ENDPOINTS: &str = "herd.dev/endpoints";
/// Value of [`ENDPOINTS`]: leaders that are ready, for gateways.
pub const ENDPOINTS_LEADERS: &str = "leaders";
/// Value of [`ENDPOINTS`]: every rank, ready or not, for the ranks of a gang.
pub const ENDPOINTS_RANKS: &str = "ranks";
/// Annotation of the leaders' Service: the names its model is served under, as a JSON array.
pub const SERVED_NAMES: &str = "herd.dev/served-names";

/// Annotation of the pods of a gang of several: how many there are. A gang says itself whether it is whole, whatever became of
/// what it was made from.
pub const PODS: &str = "herd.dev/pods";

/// Of a pod that asks a model's source what it has now: the word for what it is asked for.
pub const RESOLVES: &str = "herd.dev/resolves";
/// Finds these pods.
pub const RESOLVES_SELECTOR: &str = "app.kubernetes.io/managed-by=herd-operator,herd.dev/resolves";

/// `app.kubernetes.io/managed-by` of all that the operator makes.
pub const MANAGED_BY: &str = "herd-operator";
/// Finds all that the operator makes.
pub const MANAGED_BY_SELECTOR: &str = "app.kubernetes.io/managed-by=herd-operator";

/// Of every object of a LlamaDeployment.
pub fn of_deployment(deployment: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "herd"),
        ("app.kubernetes.io/instance", deployment),
        ("app.kubernetes.io/managed-by", MANAGED_BY),
        (DEPLOYMENT, deployment),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// Of every object of a pool.
pub fn of_pool(deployment: &str, role: Role) -> BTreeMap<String, String> {
    let mut labels = of_deployment(deployment);
    labels.insert("app.kubernetes.io/component".to_owned(), "worker".to_owned());
    labels.insert(ROLE.to_owned(), role.as_str().to_owned());
    labels
}

/// Of a pod.
pub fn of_pod(
    deployment: &str,
    role: Role,
    gang: &str,
    first_rank: usize,
    revision: &str,
) -> BTreeMap<String, String> {
    let mut labels = of_pool(deployment, role);
    labels.insert(GANG.to_owned(), gang.to_owned());
    labels.insert(RANK.to_owned(), first_rank.to_string());
    labels.insert(REVISION.to_owned(), revision.to_owned());
    labels
}

/// Selects the pods of a pool, as `/scale` and list calls want it.
pub fn pool_selector(deployment: &str, role: Role) -> String {
    format!("{DEPLOYMENT}={deployment},{ROLE}={role}")
}

/// Selects the leaders of a pool: one pod a gang.
pub fn leader_selector(deployment: &str, role: Role) -> String {
    format!("{},{RANK}=0", pool_selector(deployment, role))
}
