//! LlamaDeployment: one served model.

#![allow(clippy::doc_markdown, reason = "the comments are the descriptions that kubectl explain prints")]
#![allow(clippy::duplicated_attributes, reason = "printer columns share types")]
#![expect(unreachable_pub, reason = "KubeSchema makes a copy of each struct inside of a function")]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Role, visible};

/// One served model: where it comes from, how a copy of it is split, and how many copies there are.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "herd.dev",
    version = "v1alpha1",
    kind = "LlamaDeployment",
    doc = "One served model: `kubectl apply` it, and the operator makes the fleet that serves it.",
    plural = "llamadeployments",
    shortname = "lld",
    category = "herd",
    namespaced,
    status = "LlamaDeploymentStatus",
    derive = "PartialEq",
    validation = Rule::new("size(self.metadata.name) <= 40")
        .message("metadata.name must be at most 40 characters: the names of pods are made of it"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name must begin with a letter and have no dots: the names of Services are made of it"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Gangs", type_ = "string", json_path = ".status.gangs"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Since", type_ = "date", json_path = ".status.conditions[?(@.type==\"Ready\")].lastTransitionTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.source", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.unified) ? !has(self.prefill) && !has(self.decode) : has(self.prefill) && has(self.decode)")
    .message("give either prefill and decode, or unified")
    .reason(Reason::FieldValueInvalid))]
pub struct LlamaDeploymentSpec {
    /// What is served.
    pub model: Model,
    /// How a copy of the model is split over ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<Parallelism>,
    /// What the ranks compute on; a GPU each unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// What the autoscaler aims at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo: Option<Slo>,
    /// Gangs that compute prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<PoolTemplate>,
    /// Gangs that generate from what prefill gangs computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<PoolTemplate>,
    /// Gangs that do both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unified: Option<PoolTemplate>,
    /// Who sets how many gangs there are, between minReplicas and maxReplicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Pods of the gangs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerTemplate>,
}

/// What is served.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.secretRef) || self.source.matches('^(hf|s3)://')")
    .message("secretRef is of hf:// and s3:// sources")
    .reason(Reason::FieldValueInvalid))]
pub struct Model {
    /// `hf://ORG/NAME[@REVISION]`, `oci://REGISTRY/NAME:TAG` (an image with the checkpoint at its root), `pvc://CLAIM[/FOLDER]` or `s3://BUCKET[/PREFIX]`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new(visible::rule("self"))
        .message("model.source must be of characters that can be seen: no controls, spaces or zero-width ones")
        .reason(Reason::FieldValueInvalid))]
    #[x_kube(validation = Rule::new("self.matches('^(hf|oci|pvc|s3)://[^/]')")
        .message("model.source must be hf://ORG/NAME[@REVISION], oci://IMAGE, pvc://CLAIM[/FOLDER] or s3://BUCKET[/PREFIX]")
        .reason(Reason::FieldValueInvalid))]
    pub source: String,
    /// Who asks for it: a Secret of the same namespace with a key token for hf://; accessKeyId, secretAccessKey and, where needed, sessionToken, region and endpoint for s3://.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// Names that clients ask for, of characters that can be seen; metadata.name unless given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 128)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[x_kube(validation = Rule::new(format!("self.all(name, {})", visible::rule("name")))
        .message("model.servedNames must be of characters that can be seen: no controls, spaces or zero-width ones")
        .reason(Reason::FieldValueInvalid))]
    pub served_names: Vec<String>,
    /// Tokens of prompt and completion together; the model's unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub context_length: Option<i32>,
    /// Of activations and KV cache on the CPU; bf16 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
}

/// A Secret of the same namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct SecretRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
}

/// Of activations and KV cache.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// The reference.
    F32,
    /// The default.
    Bf16,
}

/// How a copy of the model is split.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.ranksPerPod) || (has(self.tensor) ? self.tensor : 1) % self.ranksPerPod == 0")
    .message("ranksPerPod must divide tensor")
    .reason(Reason::FieldValueInvalid))]
pub struct Parallelism {
    /// Ranks that share each layer; 1 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 128))]
    pub tensor: Option<i32>,
    /// Stages of consecutive layers; 1 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 128))]
    pub pipeline: Option<i32>,
    /// Ranks in a pod; all of a stage unless given. Fewer spread a gang over several pods, and so over nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 128))]
    pub ranks_per_pod: Option<i32>,
}

/// What the ranks compute on.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.resourceName) || !has(self.claimTemplateName)")
    .message("give resourceName or claimTemplateName, not both")
    .reason(Reason::FieldValueInvalid))]
#[x_kube(validation = Rule::new("!has(self.kind) || self.kind != 'CPU' || !has(self.resourceName) && !has(self.claimTemplateName) && !has(self.runtimeClassName)")
    .message("resourceName, claimTemplateName and runtimeClassName are of kind GPU")
    .reason(Reason::FieldValueInvalid))]
pub struct Accelerator {
    /// GPU unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<AcceleratorKind>,
    /// Of which a pod asks for one a rank; nvidia.com/gpu unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 317),
        regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$")
    )]
    pub resource_name: Option<String>,
    /// In its place, a ResourceClaimTemplate of the same namespace, which asks for the devices of all ranks of a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub claim_template_name: Option<String>,
    /// Of the pods, where the nodes' default runtime does not bring the devices in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
}

/// Kind of accelerator.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceleratorKind {
    /// One a rank.
    GPU,
    /// Threads of the pod.
    CPU,
}

/// Who sets how many gangs there are.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    /// SLO unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<AutoscalingMode>,
    /// GPUs (ranks, where they have none) of all gangs together, beyond which the autoscaler adds none. What runs goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub gpu_budget: Option<i32>,
}

/// SLO, unless given: the operator, from metrics. External: another autoscaler, through /scale. "Off", in quotes, since YAML
/// has a boolean of that name: people.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AutoscalingMode {
    /// The operator, from Prometheus's metrics.
    #[default]
    SLO,
    /// Another autoscaler, through /scale of the LlamaPools.
    External,
    /// People.
    Off,
}

/// Service-level objectives.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Slo {
    /// From request to first token: "2s", "500ms". Prompts that wait are to be computed within this; 10s unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 16),
        regex(pattern = r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)(ms|s|m)$")
    )]
    pub time_to_first_token: Option<String>,
    /// Between tokens: "50ms". Kept for a policy to come: nothing reads it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 16),
        regex(pattern = r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)(ms|s|m)$")
    )]
    pub inter_token_latency: Option<String>,
}

/// Gangs of one role.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.maxReplicas) || (has(self.minReplicas) ? self.minReplicas : 1) <= self.maxReplicas")
    .message("minReplicas must be at most maxReplicas")
    .reason(Reason::FieldValueInvalid))]
pub struct PoolTemplate {
    /// Gangs at least, and to begin with; 1 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub min_replicas: Option<i32>,
    /// Gangs at most; minReplicas unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: Option<i32>,
    /// Where this role's differs from the deployment's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<Parallelism>,
}

/// Pods of the gangs: named fields, no pod template.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct WorkerTemplate {
    /// Image of the worker; the operator's unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// More environment, or other values for what the operator sets: `HERD_KV_MEMORY`, `RUST_LOG`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Vec<EnvVar>,
    /// Requests and limits of a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Labels of nodes that may run the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that the pods bear.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// Scheduling priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub priority_class_name: Option<String>,
    /// Seconds that running requests have to end once a gang must go; 600 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 86400))]
    pub termination_grace_period_seconds: Option<i64>,
}

/// One variable.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct EnvVar {
    /// Its name.
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$"))]
    pub name: String,
    /// Its value.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Requests and limits, as of a container.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// What a node must have free.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, IntOrString>,
    /// What the pod may use.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, IntOrString>,
}

/// What became of it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LlamaDeploymentStatus {
    /// Generation of the spec that all of this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Progressing, Degraded, Scheduled, ModelAvailable, MetricsAvailable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Ready gangs of those wanted, by role: "prefill 1/1, decode 2/2".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gangs: Option<String>,
    /// The model, once a gang has loaded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// Revisions that run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["role".into()]))]
    pub revisions: Vec<Revisions>,
    /// Gangs by role.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["role".into()]))]
    pub pools: Vec<PoolStatus>,
    /// What the autoscaler did last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale: Option<LastScale>,
}

/// What a gang says of the model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// The same for every source of the same files.
    pub digest: String,
    /// Tokens of prompt and completion together.
    pub context_length: i32,
    /// Tokens whose keys and values a gang of the smallest pool holds.
    pub kv_tokens_per_gang: i64,
}

/// Revisions of one role.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Revisions {
    /// Whose.
    pub role: Role,
    /// The one that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// The one that the spec asks for.
    pub target: String,
}

/// Gangs of one role.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// Whose.
    pub role: Role,
    /// Gangs wanted.
    pub desired: i32,
    /// Gangs that can take requests.
    pub ready: i32,
    /// Gangs that end what they run, and then go.
    pub draining: i32,
}

/// A change of how many gangs there are.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct LastScale {
    /// When it was decided.
    pub time: Time,
    /// Gangs wanted from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<i32>,
    /// Gangs wanted from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<i32>,
    /// Gangs wanted from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unified: Option<i32>,
    /// Which pools changed and why, with the numbers.
    pub reason: String,
}
