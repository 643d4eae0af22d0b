//! The only way to a [`ValidatedDeployment`], which is the only input of what follows.

use std::collections::BTreeMap;
use std::time::Duration;

use herd_api::condition::{self, reason};
use herd_api::{
    Accelerator, AcceleratorKind, Autoscaling, AutoscalingMode, Dtype, EnvVar, LlamaDeployment,
    LlamaDeploymentSpec, Model, ModelSource, Parallelism, PoolTemplate, Resources, Role, SecretRef, Slo,
    WorkerTemplate,
};
use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource as _, ResourceExt as _};
use serde::{Deserialize, Serialize};

use crate::duration::duration;

/// For running requests to end once a gang must go.
const TERMINATION_GRACE_PERIOD_SECONDS: i64 = 600;
/// Of prompts that wait, where a user gave none.
const TIME_TO_FIRST_TOKEN: Duration = Duration::from_secs(10);

/// What the operator sets in a worker's pod from other fields; a value of the user's would contradict them.
const RESERVED_ENV: [&str; 26] = [
    "HERD_ADVERTISE",
    "HERD_CACHE_DIR",
    "HERD_CACHE_FOLDER",
    "HERD_CACHE_SIZE",
    "HERD_CONTEXT_LENGTH",
    "HERD_DRAIN_DEADLINE",
    "HERD_DTYPE",
    "HERD_FIRST_RANK",
    "HERD_GANG_ID",
    "HERD_GRPC",
    "HERD_HTTP",
    "HERD_KV_BIND",
    "HERD_LEADER",
    "HERD_MODEL_DIR",
    "HERD_MODEL_LEASE",
    "HERD_MODEL_NAME",
    "HERD_MODEL_PIN",
    "HERD_MODEL_SECRET",
    "HERD_MODEL_SOURCE",
    "HERD_PIPELINE",
    "HERD_RANKS_PER_POD",
    "HERD_RANK_BIND",
    "HERD_REVISION",
    "HERD_ROLE",
    "HERD_STAGE",
    "HERD_TENSOR",
];

/// Served names that older LlamaDeployments have, and whose they are: "NAMESPACE/NAME".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims(BTreeMap<String, String>);

impl Claims {
    /// The names that come before those of `deployment`: older objects keep theirs; of two of one age, the first by
    /// namespace and name.
    pub fn before<'a>(
        deployment: &LlamaDeployment,
        all: impl IntoIterator<Item = &'a LlamaDeployment>,
    ) -> Self {
        let age = |deployment: &LlamaDeployment| {
            let created = deployment.creation_timestamp().map(|time| time.0);
            // One that the server has not dated yet is the youngest.
            (created.is_none(), created, deployment.namespace(), deployment.name_any())
        };
        let own = age(deployment);
        let older = all.into_iter().filter(|other| other.uid() != deployment.uid() && age(other) < own);
        let mut claims = BTreeMap::new();
        for other in older {
            let whose = format!("{}/{}", other.namespace().unwrap_or_default(), other.name_any());
            for name in served_names(&other.spec.model, &other.name_any()) {
                claims.entry(name).or_insert_with(|| whose.clone());
            }
        }
        Self(claims)
    }
}

/// Why nothing is made of an object; `type_` is the condition that says so beside Ready.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// [`condition::READY`] or [`condition::MODEL_AVAILABLE`].
    pub type_: &'static str,
    /// A constant.
    pub reason: &'static str,
    /// Names the field and the fix.
    pub message: String,
}

/// A LlamaDeployment that can be served, with every default filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidatedDeployment {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Of everything that is made for it.
    pub owner: OwnerReference,
    /// Names clients ask for: those wanted that no older LlamaDeployment has.
    pub served_names: Vec<String>,
    /// A wanted name that an older one has, in a sentence.
    pub name_taken: Option<String>,
    /// By role, each once: prefill and decode, or unified.
    pub pools: Vec<ValidatedPool>,
    /// How it is scaled. Gangs know nothing of it.
    pub scaling: ValidatedScaling,
}

impl ValidatedDeployment {
    /// Whether the operator's own autoscaler has anything to decide.
    pub fn is_scaled(&self) -> bool {
        let can_change = |pool: &ValidatedPool| pool.min_replicas < pool.max_replicas;
        self.scaling.mode == AutoscalingMode::SLO && self.pools.iter().any(can_change)
    }
}

/// How a deployment is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidatedScaling {
    /// By whom.
    pub mode: AutoscalingMode,
    /// Ranks of all gangs together that it may come to.
    pub gpu_budget: Option<i32>,
    /// Prompts that wait are to be computed within this.
    pub time_to_first_token: Duration,
}

/// The gangs of one role.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidatedPool {
    /// Whose.
    pub role: Role,
    /// Gangs at least.
    pub min_replicas: i32,
    /// Gangs at most.
    pub max_replicas: i32,
    /// What a gang of it is made from.
    pub gang: GangSpec,
}

/// The user's fields that matter to a gang: a change of any of them makes a new revision. New fields are optional and left
/// out where they are not set, so that what they are hashed to does not change with the operator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GangSpec {
    /// As written.
    pub source: String,
    /// Name of the Secret that says who asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// Ranks that share each layer.
    pub tensor: usize,
    /// Stages that the layers are split over, where there is more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<usize>,
    /// Where those of a stage are in more than one pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks_per_pod: Option<usize>,
    /// Where the ranks compute on GPUs; on the CPU otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// "f32" or "bf16"; the worker's default where the user gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Tokens; the model's where the user gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<i32>,
    /// Where the user gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// As written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    /// As written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// As written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// As written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// As written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Seconds.
    pub termination_grace_period_seconds: i64,
}

/// GPUs of the ranks, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// Of which there is one a rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_name: Option<String>,
    /// In its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim_template_name: Option<String>,
    /// Of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,
}

impl Gpu {
    /// What a pod asks for, unless it has a claim. What the default is never changes: it is part of no revision.
    pub fn resource(&self) -> Option<&str> {
        let named = self.resource_name.as_deref().unwrap_or("nvidia.com/gpu");
        self.claim_template_name.is_none().then_some(named)
    }
}

impl GangSpec {
    /// Ranks of each pod.
    pub fn ranks_in_pod(&self) -> usize {
        self.ranks_per_pod.unwrap_or(self.tensor).max(1)
    }

    /// Ranks of a gang.
    pub fn ranks(&self) -> usize {
        self.tensor.saturating_mul(self.pipeline.unwrap_or(1))
    }

    /// The first rank of each pod of a gang.
    pub fn first_ranks(&self) -> impl ExactSizeIterator<Item = usize> {
        (0..self.ranks()).step_by(self.ranks_in_pod())
    }
}

/// Checks what admission cannot, and what is not served yet.
pub fn validate(deployment: &LlamaDeployment, claims: &Claims) -> Result<ValidatedDeployment, Refusal> {
    let name = deployment.name_any();
    let LlamaDeploymentSpec {
        model,
        parallelism,
        accelerator,
        slo,
        prefill,
        decode,
        unified,
        autoscaling,
        worker,
    } = &deployment.spec;
    let roles = match (prefill, decode, unified) {
        (Some(prefill), Some(decode), None) => vec![(Role::Prefill, prefill), (Role::Decode, decode)],
        (None, None, Some(unified)) => vec![(Role::Unified, unified)],
        _ => {
            return Err(refusal(
                reason::POOLS_INVALID,
                "give either prefill and decode, or unified".to_owned(),
            ));
        }
    };
    check_source(model)?;
    let worker = worker.clone().unwrap_or_default();
    let gpu = check_accelerator(accelerator.clone().unwrap_or_default(), worker.resources.as_ref())?;
    check_env(&worker.env)?;
    let mut pools = Vec::with_capacity(roles.len());
    for (role, template) in roles {
        let PoolTemplate { min_replicas, max_replicas, parallelism: own } = *template;
        let split = check_parallelism(own.or(*parallelism))?;
        let min_replicas = min_replicas.unwrap_or(1);
        let max_replicas = max_replicas.unwrap_or(min_replicas);
        if min_replicas > max_replicas {
            return Err(refusal(
                reason::POOLS_INVALID,
                format!(
                    "{role}.minReplicas {min_replicas} must be at most {role}.maxReplicas {max_replicas}"
                ),
            ));
        }
        pools.push(ValidatedPool {
            role,
            min_replicas,
            max_replicas,
            gang: gang_spec(model, split, gpu.clone(), &worker),
        });
    }
    let scaling = check_scaling(autoscaling.as_ref(), slo.as_ref())?;
    let (taken, served_names): (Vec<_>, Vec<_>) =
        served_names(model, &name).into_iter().partition(|name| claims.0.contains_key(name));
    let name_taken = taken.first().map(|name| {
        let whose = &claims.0[name];
        format!("the older LlamaDeployment {whose} serves {name:?}: give model.servedNames another name")
    });
    Ok(ValidatedDeployment {
        namespace: deployment.namespace().unwrap_or_default(),
        owner: deployment.controller_owner_ref(&()).ok_or_else(|| {
            refusal(reason::UNKNOWN, format!("{name} has no uid: it is not from an API server"))
        })?,
        name,
        served_names,
        name_taken,
        pools,
        scaling,
    })
}

fn refusal(reason: &'static str, message: String) -> Refusal {
    Refusal { type_: condition::READY, reason, message }
}

fn served_names(model: &Model, name: &str) -> Vec<String> {
    if model.served_names.is_empty() { vec![name.to_owned()] } else { model.served_names.clone() }
}

fn check_source(model: &Model) -> Result<(), Refusal> {
    let unavailable = |reason, message| Refusal { type_: condition::MODEL_AVAILABLE, reason, message };
    match (model.source.parse::<ModelSource>(), &model.secret_ref) {
        (Ok(ModelSource::Image(_) | ModelSource::Claim { .. }), Some(SecretRef { name })) => {
            Err(unavailable(
                reason::SECRET_NOT_NEEDED,
                format!("model.secretRef {name:?} is of hf:// and s3:// sources: remove it"),
            ))
        }
        (Ok(_), _) => Ok(()),
        (Err(error), _) => Err(unavailable(reason::SOURCE_INVALID, error.to_string())),
    }
}

fn check_accelerator(
    accelerator: Accelerator,
    resources: Option<&Resources>,
) -> Result<Option<Gpu>, Refusal> {
    let Accelerator { kind, resource_name, claim_template_name, runtime_class_name } = accelerator;
    let gpu = Gpu { resource_name, claim_template_name, runtime_class_name };
    let invalid = |message| Err(refusal(reason::ACCELERATOR_INVALID, message));
    if kind == Some(AcceleratorKind::CPU) {
        if gpu != Gpu::default() {
            return invalid(
                "accelerator.kind CPU has no resourceName, claimTemplateName and runtimeClassName: remove them"
                    .to_owned(),
            );
        }
        return Ok(None);
    }
    if gpu.resource_name.is_some() && gpu.claim_template_name.is_some() {
        return invalid("accelerator: give resourceName or claimTemplateName, not both".to_owned());
    }
    let written =
        resources.into_iter().flat_map(|Resources { requests, limits }| requests.keys().chain(limits.keys()));
    if let Some(name) = written.into_iter().find(|name| Some(name.as_str()) == gpu.resource()) {
        return invalid(format!("worker.resources names {name}, of which there is one a rank: remove it"));
    }
    Ok(Some(gpu))
}

/// How a copy of the model is split.
#[derive(Clone, Copy)]
struct Split {
    tensor: usize,
    /// Where there is more than one.
    pipeline: Option<usize>,
    /// Where that makes more than one pod a stage.
    ranks_per_pod: Option<usize>,
}

fn check_parallelism(parallelism: Option<Parallelism>) -> Result<Split, Refusal> {
    let none = Parallelism { tensor: None, pipeline: None, ranks_per_pod: None };
    let Parallelism { tensor, pipeline, ranks_per_pod } = parallelism.unwrap_or(none);
    let (tensor, pipeline) = (tensor.unwrap_or(1), pipeline.unwrap_or(1));
    let ranks = ranks_per_pod.unwrap_or(tensor);
    let invalid = |message| Err(refusal(reason::PARALLELISM_INVALID, message));
    for (name, degree) in [("tensor", tensor), ("pipeline", pipeline)] {
        if degree < 1 {
            return invalid(format!("parallelism.{name} {degree} must be at least 1"));
        }
    }
    if ranks < 1 || tensor % ranks != 0 {
        return invalid(format!(
            "parallelism.ranksPerPod {ranks} must divide parallelism.tensor {tensor}: leave it out, or set it to {}",
            nearest_divisor(tensor, ranks)
        ));
    }
    Ok(Split {
        tensor: tensor as usize,
        pipeline: (pipeline > 1).then_some(pipeline as usize),
        ranks_per_pod: (ranks < tensor).then_some(ranks as usize),
    })
}

/// The largest divisor of `tensor` that is at most `ranks`; at least 1.
fn nearest_divisor(tensor: i32, ranks: i32) -> i32 {
    (1..=ranks.min(tensor)).rev().find(|divisor| tensor % divisor == 0).unwrap_or(1)
}

fn check_scaling(autoscaling: Option<&Autoscaling>, slo: Option<&Slo>) -> Result<ValidatedScaling, Refusal> {
    let Autoscaling { mode, gpu_budget } = autoscaling.copied().unwrap_or_default();
    let invalid = |message| Err(refusal(reason::SCALING_INVALID, message));
    if let Some(budget) = gpu_budget.filter(|budget| *budget < 1) {
        return invalid(format!("autoscaling.gpuBudget {budget} must be at least 1"));
    }
    let none = Slo { time_to_first_token: None, inter_token_latency: None };
    let Slo { time_to_first_token, inter_token_latency } = slo.unwrap_or(&none);
    let read = |field, text: Option<&String>| match text.map(|text| (text, duration(text))) {
        None => Ok(None),
        Some((_, Some(duration))) => Ok(Some(duration)),
        Some((text, None)) => {
            let message = format!("slo.{field} {text:?} must be a time above 0: \"2s\", \"500ms\", \"1m\"");
            Err(refusal(reason::SCALING_INVALID, message))
        }
    };
    read("interTokenLatency", inter_token_latency.as_ref())?;
    let time_to_first_token = read("timeToFirstToken", time_to_first_token.as_ref())?;
    Ok(ValidatedScaling {
        mode: mode.unwrap_or_default(),
        gpu_budget,
        time_to_first_token: time_to_first_token.unwrap_or(TIME_TO_FIRST_TOKEN),
    })
}

fn check_env(env: &[EnvVar]) -> Result<(), Refusal> {
    match env.iter().find(|EnvVar { name, value: _ }| RESERVED_ENV.contains(&name.as_str())) {
        Some(EnvVar { name, value: _ }) => Err(refusal(
            reason::ENV_NOT_ALLOWED,
            format!("worker.env {name} is set by the operator from other fields: remove it"),
        )),
        None => Ok(()),
    }
}

fn gang_spec(
    model: &Model,
    Split { tensor, pipeline, ranks_per_pod }: Split,
    gpu: Option<Gpu>,
    worker: &WorkerTemplate,
) -> GangSpec {
    let Model { source, secret_ref, served_names: _, context_length, dtype } = model;
    let WorkerTemplate {
        image,
        env,
        resources,
        node_selector,
        tolerations,
        priority_class_name,
        termination_grace_period_seconds,
    } = worker.clone();
    GangSpec {
        source: source.clone(),
        secret: secret_ref.as_ref().map(|SecretRef { name }| name.clone()),
        tensor,
        pipeline,
        ranks_per_pod,
        gpu,
        dtype: *dtype,
        context_length: *context_length,
        image,
        env,
        resources,
        node_selector,
        tolerations,
        priority_class_name,
        termination_grace_period_seconds: termination_grace_period_seconds
            .unwrap_or(TERMINATION_GRACE_PERIOD_SECONDS),
    }
}
