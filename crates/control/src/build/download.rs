//! What a pod has more where its model is downloaded: a container that does that before the worker starts, and alone has the
//! values of the Secret.

use herd_api::{ModelSource, SourceError};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, HostPathVolumeSource, Pod, SecretKeySelector,
    Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::pod::{MODEL_VOLUME, resources, unprivileged};
use crate::GangSpec;
use crate::revision::{Download, GangTemplate, ModelCache};

/// Of the container.
pub(crate) const CONTAINER: &str = "fetch";
/// Says what it downloads.
pub(crate) const SOURCE: &str = "HERD_MODEL_SOURCE";
/// Where it writes.
const CACHE_DIR: &str = "/cache";
/// What the worker holds a lock of, so that no pod of the node removes its model.
const LEASE: &str = "/run/herd/lease";

/// Keys of a Secret, the variables they become, and whether there may be none.
const HUB_KEYS: [(&str, &str, bool); 1] = [("token", "HF_TOKEN", false)];
const BUCKET_KEYS: [(&str, &str, bool); 5] = [
    ("accessKeyId", "AWS_ACCESS_KEY_ID", false),
    ("secretAccessKey", "AWS_SECRET_ACCESS_KEY", false),
    ("sessionToken", "AWS_SESSION_TOKEN", true),
    ("region", "AWS_REGION", true),
    ("endpoint", "AWS_ENDPOINT_URL", true),
];

/// The volume of a cache, and what the worker sees of it: its own model, which it may not change, and the model's lease.
pub(super) fn volume(
    source: &ModelSource,
    template: &GangTemplate,
    mut volume: Volume,
    mut model: VolumeMount,
) -> Result<(Volume, Vec<VolumeMount>), SourceError> {
    let Some(Download { pin, cache: ModelCache { path, size } }) = &template.download else {
        return Err(SourceError(format!("{}: which files it has is not known", template.spec.source)));
    };
    match path {
        Some(path) => {
            volume.host_path = Some(HostPathVolumeSource {
                path: path.clone(),
                // It is prepared by others, for a user who is not root.
                type_: Some("Directory".to_owned()),
            });
        }
        None => {
            volume.empty_dir = Some(EmptyDirVolumeSource {
                size_limit: Some(Quantity(size.clone())),
                ..EmptyDirVolumeSource::default()
            });
        }
    }
    let folder = folder(source, pin)?;
    model.sub_path = Some(format!("{folder}/model"));
    let lease = VolumeMount {
        name: MODEL_VOLUME.to_owned(),
        mount_path: LEASE.to_owned(),
        sub_path: Some(format!("{folder}/lease")),
        ..VolumeMount::default()
    };
    Ok((volume, vec![model, lease]))
}

fn folder(source: &ModelSource, pin: &str) -> Result<String, SourceError> {
    let folder = source.cache_folder(pin).filter(|_| herd_api::is_pin(pin));
    folder.ok_or_else(|| SourceError(format!("{pin:?} is no name of downloaded files")))
}

/// Of the worker.
pub(super) fn lease() -> EnvVar {
    value("HERD_MODEL_LEASE", LEASE)
}

/// Adds the container.
pub(super) fn add(
    pod: &mut Pod,
    spec: &GangSpec,
    image: &str,
    download: &Download,
    first_rank: usize,
) -> Result<(), SourceError> {
    let Download { pin, cache: ModelCache { path: _, size } } = download;
    let source: ModelSource = spec.source.parse()?;
    let mut env = source_env(spec, &source);
    env.extend([
        value("HERD_MODEL_PIN", pin),
        value("HERD_CACHE_DIR", CACHE_DIR),
        value("HERD_CACHE_FOLDER", &folder(&source, pin)?),
        value("HERD_CACHE_SIZE", size),
    ]);
    if let Some(stages) = spec.pipeline {
        // Of large files it gets those with weights of its stage.
        env.push(value("HERD_PIPELINE", &stages.to_string()));
        env.push(value("HERD_STAGE", &(first_rank / spec.tensor.max(1)).to_string()));
    }
    let container = Container {
        args: Some(vec!["fetch".to_owned()]),
        // What the pod asks for anyway: the worker starts when this has ended.
        resources: resources(spec),
        volume_mounts: Some(vec![VolumeMount {
            name: MODEL_VOLUME.to_owned(),
            mount_path: CACHE_DIR.to_owned(),
            ..VolumeMount::default()
        }]),
        ..container(CONTAINER, image, user_after(env, spec))
    };
    if let Some(pod) = &mut pod.spec {
        pod.init_containers.get_or_insert_default().push(container);
    }
    Ok(())
}

/// A container of the worker's image that ends.
pub(super) fn container(name: &str, image: &str, env: Vec<EnvVar>) -> Container {
    Container {
        name: name.to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        env: Some(env),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        security_context: Some(unprivileged()),
        ..Container::default()
    }
}

/// What is asked for, and who asks.
pub(super) fn source_env(spec: &GangSpec, source: &ModelSource) -> Vec<EnvVar> {
    let mut env = vec![value(SOURCE, &spec.source)];
    let Some(secret) = &spec.secret else { return env };
    env.push(value("HERD_MODEL_SECRET", secret));
    let keys = if matches!(source, ModelSource::Bucket(_)) { &BUCKET_KEYS[..] } else { &HUB_KEYS[..] };
    env.extend(keys.iter().map(|(key, name, is_optional)| EnvVar {
        name: (*name).to_owned(),
        value: None,
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: secret.clone(),
                key: (*key).to_owned(),
                optional: is_optional.then_some(true),
            }),
            ..EnvVarSource::default()
        }),
    }));
    env
}

/// The user's too: proxies and other servers are named there.
pub(super) fn user_after(mut env: Vec<EnvVar>, spec: &GangSpec) -> Vec<EnvVar> {
    if spec.env.iter().all(|variable| variable.name != "HERD_LOG_FORMAT") {
        env.push(value("HERD_LOG_FORMAT", "json"));
    }
    env.extend(spec.env.iter().map(|variable| value(&variable.name, &variable.value)));
    env
}

fn value(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}
