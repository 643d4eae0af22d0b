//! Revisions: what gangs are made from, kept as it was when it was first asked for.

use std::fmt::Write as _;

use herd_api::{Dtype, EnvVar, ModelSource, Resources};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::Toleration;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{GangSpec, Gpu};

/// Hex digits of a revision: 40 bits, among the handful that a LlamaDeployment has at a time.
const HASH_DIGITS: usize = 10;

/// What the operator fills in where a user gave nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Image of workers.
    pub worker_image: String,
    /// Where pods keep models that they download.
    pub model_cache: ModelCache,
}

/// Where pods keep models that they download.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCache {
    /// A folder of the node, for all pods there; each pod has its own otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What all models in it may have, as Kubernetes writes sizes.
    pub size: String,
}

impl Default for ModelCache {
    fn default() -> Self {
        Self { path: None, size: "500Gi".to_owned() }
    }
}

/// How pods come by a model that Kubernetes does not bring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// Which files of the source: it is of no other ones.
    pub pin: String,
    /// Where they are kept.
    pub cache: ModelCache,
}

/// All that a gang's pods are built from. Stored in a `ControllerRevision` when the revision is first seen, so that another
/// operator with other defaults makes the same gangs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GangTemplate {
    /// What the user wrote.
    pub spec: GangSpec,
    /// The worker's image, the default filled in.
    pub image: String,
    /// Of a source whose files pods download.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<Download>,
}

/// Why a stored revision cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RevisionError {
    /// Somebody else's, or damaged.
    #[error("failed to read the data of ControllerRevision {name}: {source}")]
    Data {
        /// The object.
        name: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// A name for these fields: equal fields, equal name, whatever operator looks.
pub fn hash(spec: &GangSpec) -> String {
    hash_pinned(spec, None)
}

/// A name for these fields and the files of their source.
pub fn hash_pinned(spec: &GangSpec, pin: Option<&str>) -> String {
    let mut text = String::new();
    canonical(spec, &mut text);
    if let Some(pin) = pin {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "pin {} {pin}", pin.len());
    }
    short(&text)
}

pub(crate) fn short(text: &str) -> String {
    let mut hash = format!("{:x}", Sha256::digest(text));
    hash.truncate(HASH_DIGITS);
    hash
}

/// Writes every field that is set, in a fixed order. A new field is written only where it is set.
fn canonical(spec: &GangSpec, out: &mut String) {
    let GangSpec {
        source,
        secret,
        tensor,
        pipeline,
        ranks_per_pod,
        gpu,
        dtype,
        context_length,
        image,
        env,
        resources,
        node_selector,
        tolerations,
        priority_class_name,
        termination_grace_period_seconds,
    } = spec;
    let mut field = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            // Lengths keep one value from looking like two fields. Writing to a string cannot fail.
            let _ = writeln!(out, "{name} {} {value}", value.len());
        }
    };
    field("source", Some(source.clone()));
    field("secret", secret.clone());
    field("tensor", Some(tensor.to_string()));
    field("pipeline", pipeline.map(|stages| stages.to_string()));
    field("ranksPerPod", ranks_per_pod.map(|ranks| ranks.to_string()));
    if let Some(Gpu { resource_name, claim_template_name, runtime_class_name }) = gpu {
        field("accelerator", Some("GPU".to_owned()));
        field("resourceName", resource_name.clone());
        field("claimTemplateName", claim_template_name.clone());
        field("runtimeClassName", runtime_class_name.clone());
    }
    field("dtype", dtype.map(|dtype| dtype_word(dtype).to_owned()));
    field("contextLength", context_length.map(|length| length.to_string()));
    field("image", image.clone());
    for EnvVar { name, value } in env {
        field("env", Some(format!("{name}={value}")));
    }
    if let Some(Resources { requests, limits }) = resources {
        for (kind, list) in [("request", requests), ("limit", limits)] {
            for (name, quantity) in list {
                field(kind, Some(format!("{name}={}", quantity_text(quantity))));
            }
        }
    }
    for (name, value) in node_selector {
        field("nodeSelector", Some(format!("{name}={value}")));
    }
    for Toleration { effect, key, operator, toleration_seconds, value } in tolerations {
        field("toleration", Some(String::new()));
        field("effect", effect.clone());
        field("key", key.clone());
        field("operator", operator.clone());
        field("tolerationSeconds", toleration_seconds.map(|seconds| seconds.to_string()));
        field("value", value.clone());
    }
    field("priorityClassName", priority_class_name.clone());
    field("terminationGracePeriodSeconds", Some(termination_grace_period_seconds.to_string()));
}

/// As the worker's flag has it.
pub(crate) fn dtype_word(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::Bf16 => "bf16",
    }
}

pub(crate) fn quantity_text(quantity: &k8s_openapi::apimachinery::pkg::util::intstr::IntOrString) -> String {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::{Int, String};
    match quantity {
        Int(number) => number.to_string(),
        String(text) => text.clone(),
    }
}

impl GangTemplate {
    /// With the defaults of today.
    pub fn new(spec: &GangSpec, defaults: &Defaults) -> Self {
        let image = spec.image.clone().unwrap_or_else(|| defaults.worker_image.clone());
        Self { spec: spec.clone(), image, download: None }
    }

    /// Of these files.
    #[must_use]
    pub fn with_pin(mut self, pin: Option<&str>, defaults: &Defaults) -> Self {
        self.download = pin.map(|pin| Download { pin: pin.to_owned(), cache: defaults.model_cache.clone() });
        self
    }

    /// Which files of its source it is of, where pods download them.
    pub fn pin(&self) -> Option<&str> {
        self.download.as_ref().map(|download| download.pin.as_str())
    }

    /// As it was stored.
    pub fn read(stored: &ControllerRevision) -> Result<Self, RevisionError> {
        let name = || stored.metadata.name.clone().unwrap_or_default();
        serde_json::from_value(stored.data.0.clone())
            .map_err(|source| RevisionError::Data { name: name(), source })
    }

    /// Where its weights are.
    pub fn source(&self) -> Result<ModelSource, herd_api::SourceError> {
        self.spec.source.parse()
    }
}
