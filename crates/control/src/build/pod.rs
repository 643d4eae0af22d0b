//! The pod of a gang: all of its ranks are threads of one worker.

use std::collections::BTreeMap;

use herd_api::{ModelSource, Role, SourceError, labels, names, ports};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, ImageVolumeSource,
    ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod, PodSecurityContext, PodSpec, Probe,
    ResourceRequirements, SeccompProfile, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::metadata;
use crate::GangSpec;
use crate::revision::{GangTemplate, dtype_word, quantity_text};

/// Where the checkpoint is in a pod.
const MODEL_DIR: &str = "/model";
const MODEL_VOLUME: &str = "model";
/// "nobody": no user of the image.
const USER: i64 = 65532;
/// Between the end of a drain and SIGKILL.
const AFTER_DRAIN_SECONDS: i64 = 5;

/// What a pod is made from.
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
}

/// The one pod of a gang.
pub fn pod(input: PodInput<'_>) -> Result<Pod, SourceError> {
    let PodInput { deployment, namespace, owner, role, gang, revision, template } = input;
    let GangSpec {
        source: _,
        tensor: _,
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
    let (volume, mount) = model(&template.source()?);
    let mut metadata = metadata(
        namespace,
        names::pod(deployment, gang, 0),
        owner,
        labels::of_pod(deployment, role, gang, 0, revision),
    );
    metadata.annotations = Some(strings([
        ("kubectl.kubernetes.io/default-container", "worker"),
        ("prometheus.io/scrape", "true"),
        ("prometheus.io/port", &ports::HTTP.to_string()),
    ]));
    Ok(Pod {
        metadata,
        spec: Some(PodSpec {
            containers: vec![worker(template, gang, revision, mount)],
            volumes: Some(vec![volume]),
            node_selector: (!node_selector.is_empty()).then(|| node_selector.clone()),
            tolerations: (!tolerations.is_empty()).then(|| tolerations.clone()),
            priority_class_name: priority_class_name.clone(),
            termination_grace_period_seconds: Some(*termination_grace_period_seconds),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER),
                run_as_group: Some(USER),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    localhost_profile: None,
                }),
                ..PodSecurityContext::default()
            }),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            // The worker is not process 1 then, for which Linux drops a SIGTERM that comes before it is waited for: a pod that is
            // deleted as it starts would stay for its whole grace period.
            share_process_namespace: Some(true),
            restart_policy: Some("Always".to_owned()),
            ..PodSpec::default()
        }),
        status: None,
    })
}

fn model(source: &ModelSource) -> (Volume, VolumeMount) {
    let mut volume = Volume { name: MODEL_VOLUME.to_owned(), ..Volume::default() };
    let mut mount = VolumeMount {
        name: MODEL_VOLUME.to_owned(),
        mount_path: MODEL_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    match source {
        ModelSource::Claim { claim, folder } => {
            volume.persistent_volume_claim =
                Some(PersistentVolumeClaimVolumeSource { claim_name: claim.clone(), read_only: Some(true) });
            mount.sub_path = (!folder.is_empty()).then(|| folder.clone());
        }
        // The others are refused before a revision is made of them.
        ModelSource::Image(reference)
        | ModelSource::HuggingFace(reference)
        | ModelSource::Bucket(reference) => {
            volume.image = Some(ImageVolumeSource {
                reference: Some(reference.clone()),
                pull_policy: Some("IfNotPresent".to_owned()),
            });
        }
    }
    (volume, mount)
}

fn worker(template: &GangTemplate, gang: &str, revision: &str, model: VolumeMount) -> Container {
    let GangTemplate { spec, image } = template;
    Container {
        name: "worker".to_owned(),
        image: Some(image.clone()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        env: Some(env(spec, gang, revision)),
        ports: Some(container_ports(spec.tensor)),
        resources: resources(spec),
        volume_mounts: Some(vec![model]),
        // Alive while it loads, however long that takes.
        liveness_probe: Some(probe("/healthz", 10, 6)),
        readiness_probe: Some(probe("/readyz", 2, 3)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// The operator's own, with the user's after them.
fn env(spec: &GangSpec, gang: &str, revision: &str) -> Vec<EnvVar> {
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
        // The label as it is at each start of the container: a gang that starts anew in place keeps a changed role.
        field("HERD_ROLE", format!("metadata.labels['{}']", labels::ROLE)),
        value("HERD_DRAIN_DEADLINE", drain.to_string()),
    ];
    env.extend(spec.dtype.map(|dtype| value("HERD_DTYPE", dtype_word(dtype).to_owned())));
    env.extend(spec.context_length.map(|length| value("HERD_CONTEXT_LENGTH", length.to_string())));
    if spec.env.iter().all(|variable| variable.name != "HERD_LOG_FORMAT") {
        env.push(value("HERD_LOG_FORMAT", "json".to_owned()));
    }
    env.extend(spec.env.iter().map(|variable| value(&variable.name, variable.value.clone())));
    env
}

fn container_ports(tensor: usize) -> Vec<ContainerPort> {
    let port = |name: String, port: i32| ContainerPort {
        name: Some(name),
        container_port: port,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let fixed =
        [port(ports::GRPC_NAME.to_owned(), ports::GRPC), port(ports::HTTP_NAME.to_owned(), ports::HTTP)];
    let ranks = (0..tensor).map(|rank| port(format!("kv-{rank}"), ports::KV + rank as i32));
    fixed.into_iter().chain(ranks).collect()
}

fn resources(spec: &GangSpec) -> Option<ResourceRequirements> {
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
