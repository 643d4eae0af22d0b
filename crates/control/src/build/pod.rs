//! The pods of a gang: the ranks of a pod are threads of one worker.

use std::collections::BTreeMap;

use herd_api::{ModelSource, Role, SourceError, labels, names, ports};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, ImageVolumeSource,
    ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod, PodSchedulingGroup, PodSecurityContext,
    PodSpec, Probe, ResourceRequirements, SeccompProfile, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{download, gpu, metadata};
use crate::GangSpec;
use crate::revision::{GangTemplate, dtype_word, quantity_text};

/// Where the checkpoint is in a pod.
const MODEL_DIR: &str = "/model";
pub(super) const MODEL_VOLUME: &str = "model";
/// "nobody": no user of the image.
const USER: i64 = 65532;
/// Between the end of a drain and SIGKILL.
const AFTER_DRAIN_SECONDS: i64 = 5;

/// What the pods of a gang are made from.
#[derive(Clone, Copy, Debug)]
pub struct PodInput<'a> {
    /// The LlamaDeployment.
    pub deployment: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// The LlamaPool.
    pub owner: &'a OwnerReference,
    /// What is routed to the gang at first.
    pub role: Role,
    /// Fresh.
    pub gang: &'a str,
    /// Hash of `template`.
    pub revision: &'a str,
    /// As stored.
    pub template: &'a GangTemplate,
    /// Whether the cluster has `PodGroup`s, which give nodes to all pods of a gang or to none.
    pub pod_groups: bool,
}

/// Which pod of a gang.
#[derive(Clone, Copy)]
struct Place {
    /// The first of its ranks.
    first_rank: usize,
    /// How many it has.
    ranks: usize,
    /// How many pods the gang has.
    pods: usize,
}

/// All pods of a gang, the leader first. That of a gang of one pod has nothing in it that concerns others.
pub fn pods(input: PodInput<'_>) -> Result<Vec<Pod>, SourceError> {
    let spec = &input.template.spec;
    let (first_ranks, ranks) = (spec.first_ranks(), spec.ranks_in_pod());
    let pods = first_ranks.len();
    first_ranks.map(|first_rank| pod(input, Place { first_rank, ranks, pods })).collect()
}

fn pod(input: PodInput<'_>, place: Place) -> Result<Pod, SourceError> {
    let PodInput { deployment, namespace, owner, role, gang, revision, template, pod_groups } = input;
    let GangSpec {
        source: _,
        secret: _,
        tensor: _,
        pipeline: _,
        ranks_per_pod: _,
        gpu,
        dtype: _,
        context_length: _,
        image: _,
        env: _,
        resources: _,
        node_selector,
        tolerations,
        priority_class_name,
        termination_grace_period_seconds,
    } = &template.spec;
    let (volume, mounts) = model(template)?;
    let Place { first_rank, ranks, pods } = place;
    let name = names::pod(deployment, gang, first_rank);
    let is_one_of_several = pods > 1;
    let labels = labels::of_pod(deployment, role, gang, first_rank, revision);
    let mut metadata = metadata(namespace, name.clone(), owner, labels);
    let mut annotations = strings([
        ("kubectl.kubernetes.io/default-container", "worker"),
        ("prometheus.io/scrape", "true"),
        ("prometheus.io/port", &ports::HTTP.to_string()),
    ]);
    if is_one_of_several {
        annotations.insert(labels::PODS.to_owned(), pods.to_string());
    }
    metadata.annotations = Some(annotations);
    let mut pod = Pod {
        metadata,
        spec: Some(PodSpec {
            containers: vec![worker(input, place, mounts)],
            // Together the name by which the pods of a gang find each other.
            hostname: is_one_of_several.then_some(name),
            subdomain: is_one_of_several.then(|| names::ranks_service(deployment)),
            scheduling_group: (is_one_of_several && pod_groups)
                .then(|| PodSchedulingGroup { pod_group_name: Some(names::pod_group(deployment, gang)) }),
            volumes: Some(vec![volume]),
            node_selector: (!node_selector.is_empty()).then(|| node_selector.clone()),
            tolerations: (!tolerations.is_empty()).then(|| tolerations.clone()),
            priority_class_name: priority_class_name.clone(),
            termination_grace_period_seconds: Some(*termination_grace_period_seconds),
            security_context: Some(nobody()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            // The worker is not process 1 then, for which Linux drops a SIGTERM that comes before it is waited for: a pod that is
            // deleted as it starts would stay for its whole grace period.
            share_process_namespace: Some(true),
            restart_policy: Some("Always".to_owned()),
            ..PodSpec::default()
        }),
        status: None,
    };
    if let Some(download) = &template.download {
        download::add(&mut pod, &template.spec, &template.image, download, first_rank)?;
    }
    if let Some(gpu) = gpu {
        gpu::add(&mut pod, &template.spec, gpu, ranks);
    }
    Ok(pod)
}

fn model(template: &GangTemplate) -> Result<(Volume, Vec<VolumeMount>), SourceError> {
    let mut volume = Volume { name: MODEL_VOLUME.to_owned(), ..Volume::default() };
    let mut mount = VolumeMount {
        name: MODEL_VOLUME.to_owned(),
        mount_path: MODEL_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    match template.source()? {
        ModelSource::Claim { claim, folder } => {
            volume.persistent_volume_claim =
                Some(PersistentVolumeClaimVolumeSource { claim_name: claim, read_only: Some(true) });
            mount.sub_path = (!folder.is_empty()).then_some(folder);
        }
        ModelSource::Image(reference) => {
            volume.image = Some(ImageVolumeSource {
                reference: Some(reference),
                pull_policy: Some("IfNotPresent".to_owned()),
            });
        }
        source @ (ModelSource::HuggingFace(_) | ModelSource::Bucket(_)) => {
            return download::volume(&source, template, volume, mount);
        }
    }
    Ok((volume, vec![mount]))
}

fn worker(input: PodInput<'_>, place: Place, mounts: Vec<VolumeMount>) -> Container {
    let GangTemplate { spec, image, download } = input.template;
    let mut env = env(input, place);
    if download.is_some() {
        env.insert(1, download::lease());
    }
    Container {
        name: "worker".to_owned(),
        image: Some(image.clone()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        env: Some(env),
        ports: Some(container_ports(place)),
        resources: resources(spec),
        volume_mounts: Some(mounts),
        // Alive while it loads, however long that takes.
        liveness_probe: Some(probe("/healthz", 10, 6)),
        readiness_probe: Some(probe("/readyz", 2, 3)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(unprivileged()),
        ..Container::default()
    }
}

/// Of each container.
pub(super) fn unprivileged() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
        ..SecurityContext::default()
    }
}

/// Of each pod.
pub(super) fn nobody() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

/// The operator's own, with the user's after them.
fn env(input: PodInput<'_>, place: Place) -> Vec<EnvVar> {
    let PodInput { deployment, namespace, owner: _, role: _, gang, revision, template, pod_groups: _ } =
        input;
    let Place { first_rank, ranks, pods } = place;
    let spec = &template.spec;
    let value =
        |name: &str, value: String| EnvVar { name: name.to_owned(), value: Some(value), value_from: None };
    let field = |name: &str, path: String| EnvVar {
        name: name.to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { api_version: None, field_path: path }),
            ..EnvVarSource::default()
        }),
    };
    let drain = (spec.termination_grace_period_seconds - AFTER_DRAIN_SECONDS).max(1);
    let mut env = vec![
        value("HERD_MODEL_DIR", MODEL_DIR.to_owned()),
        value("HERD_TENSOR", spec.tensor.to_string()),
        value("HERD_GRPC", format!("0.0.0.0:{}", ports::GRPC)),
        value("HERD_HTTP", format!("0.0.0.0:{}", ports::HTTP)),
        value("HERD_KV_BIND", format!("0.0.0.0:{}", ports::KV)),
        field("HERD_ADVERTISE", "status.podIP".to_owned()),
        value("HERD_GANG_ID", gang.to_owned()),
        value("HERD_REVISION", revision.to_owned()),
        value("HERD_MODEL_NAME", deployment.to_owned()),
        // The label as it is at each start of the container: a gang that starts anew in place keeps a changed role.
        field("HERD_ROLE", format!("metadata.labels['{}']", labels::ROLE)),
        value("HERD_DRAIN_DEADLINE", drain.to_string()),
    ];
    env.extend(spec.pipeline.map(|stages| value("HERD_PIPELINE", stages.to_string())));
    if pods > 1 {
        let leader = names::pod_host(deployment, namespace, gang, 0);
        env.extend([
            value("HERD_RANKS_PER_POD", ranks.to_string()),
            value("HERD_FIRST_RANK", first_rank.to_string()),
            value("HERD_LEADER", format!("{leader}:{}", ports::GRPC)),
            value("HERD_RANK_BIND", format!("0.0.0.0:{}", ports::RANK)),
        ]);
    }
    env.extend(spec.dtype.map(|dtype| value("HERD_DTYPE", dtype_word(dtype).to_owned())));
    env.extend(spec.context_length.map(|length| value("HERD_CONTEXT_LENGTH", length.to_string())));
    if spec.env.iter().all(|variable| variable.name != "HERD_LOG_FORMAT") {
        env.push(value("HERD_LOG_FORMAT", "json".to_owned()));
    }
    env.extend(spec.env.iter().map(|variable| value(&variable.name, variable.value.clone())));
    env
}

fn container_ports(Place { first_rank, ranks, pods }: Place) -> Vec<ContainerPort> {
    let port = |name: String, port: i32| ContainerPort {
        name: Some(name),
        container_port: port,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let fixed =
        [port(ports::GRPC_NAME.to_owned(), ports::GRPC), port(ports::HTTP_NAME.to_owned(), ports::HTTP)];
    let kv = (0..ranks).map(|own| port(format!("kv-{}", first_rank + own), ports::KV + own as i32));
    let rank = (pods > 1).then(|| port(ports::RANK_NAME.to_owned(), ports::RANK));
    fixed.into_iter().chain(kv).chain(rank).collect()
}

pub(super) fn resources(spec: &GangSpec) -> Option<ResourceRequirements> {
    let herd_api::Resources { requests, limits } = spec.resources.as_ref()?;
    let quantities = |list: &BTreeMap<String, IntOrString>| -> Option<BTreeMap<String, Quantity>> {
        let quantity =
            |(name, quantity): (&String, &IntOrString)| (name.clone(), Quantity(quantity_text(quantity)));
        (!list.is_empty()).then(|| list.iter().map(quantity).collect())
    };
    Some(ResourceRequirements {
        requests: quantities(requests),
        limits: quantities(limits),
        ..ResourceRequirements::default()
    })
}

fn probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(ports::HTTP_NAME.to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(5),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

fn strings<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}
