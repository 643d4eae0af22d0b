//! What users write and what the operator answers: the custom resources of `herd.dev/v1alpha1`, and every name, label and
//! condition reason that more than one component must spell alike. No client, no clock.

pub mod condition;
mod deployment;
pub mod labels;
pub mod names;
mod pool;
pub mod ports;
mod visible;

pub use deployment::{
    Accelerator, AcceleratorKind, Autoscaling, AutoscalingMode, Dtype, EnvVar, LastScale, LlamaDeployment,
    LlamaDeploymentSpec, LlamaDeploymentStatus, Model, ModelStatus, Parallelism, PoolStatus, PoolTemplate,
    Resources, Revisions, SecretRef, Slo, WorkerTemplate,
};
pub use herd_model::{BucketModel, HubModel, ModelSource, SourceError, is_pin};
pub use pool::{
    DeploymentRef, GangFailure, GangPhase, GangStatus, LlamaPool, LlamaPoolSpec, LlamaPoolStatus, Role,
    Target,
};
pub use visible::is_visible;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// Group of the custom resources, and prefix of labels.
pub const GROUP: &str = "herd.dev";

/// Every custom resource definition, with its schema.
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![LlamaDeployment::crd(), LlamaPool::crd()]
}

/// A definition as the file in `crds/` that people and charts apply.
pub fn crd_yaml(crd: &CustomResourceDefinition) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(crd)
}
