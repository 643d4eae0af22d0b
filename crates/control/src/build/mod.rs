//! Kubernetes objects from plans. Objects for server-side apply say only what the operator owns.

pub(crate) mod download;
mod gpu;
mod pod;
mod pod_group;
mod policy;
mod pool;
mod resolver;
mod revision;
mod services;
mod tolerations;

pub use pod::{PodInput, pods};
pub use pod_group::pod_group;
pub use policy::disruption_budget;
pub use pool::{new_pool, pool};
pub use resolver::resolver;
pub use revision::revision;
pub use services::{leaders_service, ranks_service};

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

fn metadata(
    namespace: &str,
    name: String,
    owner: &OwnerReference,
    labels: BTreeMap<String, String>,
) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(namespace.to_owned()),
        labels: Some(labels),
        owner_references: Some(vec![owner.clone()]),
        ..ObjectMeta::default()
    }
}
