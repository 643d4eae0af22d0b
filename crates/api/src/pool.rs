//! LlamaPool: the gangs of one role. It outlives revisions, so that a scaler has one stable target.

#![allow(clippy::doc_markdown, reason = "the comments are the descriptions that kubectl explain prints")]
#![allow(clippy::duplicated_attributes, reason = "printer columns share types")]
#![expect(unreachable_pub, reason = "KubeSchema makes a copy of each struct inside of a function")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The gangs of one role of a LlamaDeployment; made and removed by the operator. Scale it with `kubectl scale`.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "herd.dev",
    version = "v1alpha1",
    kind = "LlamaPool",
    doc = "The gangs of one role of a LlamaDeployment; made and removed by the operator. Scale it with `kubectl scale`.",
    plural = "llamapools",
    shortname = "llp",
    category = "herd",
    namespaced,
    status = "LlamaPoolStatus",
    derive = "PartialEq",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Role", type_ = "string", json_path = ".spec.role"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Gangs", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub struct LlamaPoolSpec {
    /// Whose gangs these are.
    #[x_kube(validation = Rule::new("self == oldSelf").message("deploymentRef is immutable"))]
    pub deployment_ref: DeploymentRef,
    /// What is routed to them.
    #[x_kube(validation = Rule::new("self == oldSelf").message("role is immutable"))]
    pub role: Role,
    /// Gangs wanted: for people and autoscalers to change. Kept within minReplicas and maxReplicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<i32>,
    /// Of the LlamaDeployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: Option<i32>,
    /// Of the LlamaDeployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_replicas: Option<i32>,
    /// How many gangs of which revision: the operator's, from all of the above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    // Whole: of a map, entries that another field manager wrote once would stay, and with them gangs of old revisions.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub targets: Vec<Target>,
}

/// A LlamaDeployment of the same namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct DeploymentRef {
    /// Its name.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
}

/// What is routed to a gang; every gang can do all of it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prompts.
    Prefill,
    /// Generation from what prefill gangs computed.
    Decode,
    /// Both.
    Unified,
}

impl Role {
    /// As in labels, names and flags.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Unified => "unified",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Gangs wanted of one revision.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Hash of what a gang is made from, see the `ControllerRevision`.
    #[schemars(length(min = 1, max = 63))]
    pub revision: String,
    /// How many.
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
}

/// What became of it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct LlamaPoolStatus {
    /// Generation of the spec that all of this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Gangs there are, those that drain left out.
    #[serde(default)]
    pub replicas: i32,
    /// Gangs that can take requests.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Gangs that end what they run, and then go.
    #[serde(default)]
    pub draining_replicas: i32,
    /// Of the leaders' pods, for /scale.
    #[serde(default)]
    pub selector: String,
    /// Ready, Scheduled, ModelAvailable, Degraded, ScalingLimited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The last gang that was given up, until every wanted gang is Ready: the next one is made later and later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<GangFailure>,
    /// The gangs, by id; at most 256 are listed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["id".into()]))]
    pub gangs: Vec<GangStatus>,
}

/// One copy of the model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct GangStatus {
    /// Generated, never used again.
    pub id: String,
    /// What it was made from.
    pub revision: String,
    /// Where it stands.
    pub phase: GangPhase,
    /// Times its processes were started anew in place.
    #[serde(default)]
    pub restarts: i32,
    /// Why it is not Ready, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A gang that was given up: its pod is lost or could not be created, or not all of its pods found a node.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct GangFailure {
    /// What it was made from.
    pub revision: String,
    /// When the first of those that were given up one after another was.
    pub since: Time,
    /// When this one was.
    pub time: Time,
    /// Unschedulable, FailedCreate, or why a pod is lost.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// Where a gang stands.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GangPhase {
    /// Not all of its pods are on nodes.
    Pending,
    /// Pulling, mounting, loading weights.
    Starting,
    /// Takes requests.
    Ready,
    /// A process of it ended with an error; it is started anew in place.
    CrashLooping,
    /// A pod of it is lost; it is replaced as a whole.
    Failed,
    /// Ends what it runs, and then goes.
    Draining,
}
