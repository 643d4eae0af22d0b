//! Models that pods download: asked for once, pinned, and brought before the worker starts.

use herd_api::condition::{self, reason};
use herd_api::{GangPhase, LlamaDeploymentStatus, Role, labels};
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, VolumeMount};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::deployment::{Cluster, apart};
use super::{checked, object, pods_of, spec};
use crate::ValidatedDeployment;
use crate::gang::gangs;
use crate::plan::{DeploymentPlan, Unresolved};
use crate::revision::{Defaults, GangTemplate, ModelCache};
use crate::status::{DeploymentView, ScalingView, deployment_status};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";

fn from_hub(change: impl FnOnce(&mut Value)) -> ValidatedDeployment {
    checked(|spec| {
        spec["model"] = json!({"source": "hf://a/b", "secretRef": {"name": "hub"}});
        change(spec);
    })
    .unwrap()
}

/// The pod that asks has this status.
fn answers(cluster: &mut Cluster, status: Value) {
    cluster.0.resolvers[0].status = Some(serde_json::from_value(status).unwrap());
}

fn ended(message: &str) -> Value {
    let ended = json!({"terminated": {"exitCode": 0, "message": message}});
    let container = json!({"name": "resolve", "image": "w", "imageID": "", "ready": false, "restartCount": 0, "state": ended});
    json!({"phase": "Succeeded", "containerStatuses": [container]})
}

/// It is asked, and answers this.
fn resolved(cluster: &mut Cluster, deployment: &ValidatedDeployment, pin: &str) -> DeploymentPlan {
    let asks = cluster.pass(deployment);
    assert!(asks.resolve.is_some() && asks.revisions.is_empty() && asks.unresolved.is_some());
    answers(cluster, ended(&json!({"pin": pin, "bytes": 7}).to_string()));
    let plan = cluster.pass(deployment);
    assert!(cluster.0.resolvers.is_empty() && plan.unresolved.is_none());
    plan
}

fn pin_of(cluster: &mut Cluster, role: Role) -> String {
    let target = cluster.pool(role).spec.targets.last().unwrap().revision.clone();
    let name = Some(herd_api::names::revision("m", &target));
    let stored = cluster.0.revisions.iter().find(|stored| stored.metadata.name == name).unwrap();
    GangTemplate::read(stored).unwrap().pin().unwrap().to_owned()
}

#[test]
fn a_source_is_asked_once_and_before_anything_is_made() {
    let deployment = from_hub(apart);
    let mut cluster = Cluster::default();
    let first = cluster.pass(&deployment);
    assert!(first.resolve.is_some() && first.pools.is_empty() && first.revisions.is_empty());
    // While it has not answered it is not asked again.
    assert!(cluster.pass(&deployment).resolve.is_none());
    assert_eq!(cluster.0.resolvers.len(), 1);
    answers(&mut cluster, ended(&json!({"pin": COMMIT, "bytes": 7}).to_string()));
    let made = cluster.pass(&deployment);
    assert_eq!((made.revisions.len(), made.pools.len(), made.delete_resolvers.len()), (1, 2, 1));
    assert_eq!([Role::Prefill, Role::Decode].map(|role| pin_of(&mut cluster, role)), [COMMIT, COMMIT]);
    let after = cluster.pass(&deployment);
    assert!(after.resolve.is_none() && after.revisions.is_empty());
}

#[test]
fn all_roles_are_made_of_the_same_files() {
    let mut cluster = Cluster::default();
    resolved(&mut cluster, &from_hub(apart), COMMIT);
    // The branch may have moved: what decode runs is what prefill gets.
    let changed = from_hub(|spec| {
        apart(spec);
        spec["prefill"]["parallelism"] = json!({"tensor": 1});
    });
    let plan = cluster.pass(&changed);
    assert!(plan.resolve.is_none());
    assert_eq!(plan.revisions.len(), 1);
    assert_eq!([Role::Prefill, Role::Decode].map(|role| pin_of(&mut cluster, role)), [COMMIT, COMMIT]);
    // Where nothing stays as it was it is asked anew.
    let other = from_hub(|spec| {
        apart(spec);
        spec["model"]["contextLength"] = json!(64);
    });
    resolved(&mut cluster, &other, LATER);
    assert_eq!([Role::Prefill, Role::Decode].map(|role| pin_of(&mut cluster, role)), [LATER, LATER]);
    // One role as it was at first, and the other as it runs: again the same.
    let mixed = from_hub(|spec| {
        apart(spec);
        spec["model"]["contextLength"] = json!(64);
        spec["prefill"]["parallelism"] = json!({"tensor": 1});
    });
    cluster.pass(&mixed);
    assert_eq!([Role::Prefill, Role::Decode].map(|role| pin_of(&mut cluster, role)), [LATER, LATER]);
}

#[test]
fn what_ran_before_is_what_it_was_then() {
    let mut cluster = Cluster::default();
    let first = from_hub(|_| {});
    resolved(&mut cluster, &first, COMMIT);
    let before = cluster.pool(Role::Unified).spec.targets[0].revision.clone();
    let second = from_hub(|spec| spec["model"]["contextLength"] = json!(64));
    resolved(&mut cluster, &second, LATER);
    assert_eq!(pin_of(&mut cluster, Role::Unified), LATER);
    assert!(cluster.pass(&first).resolve.is_none());
    assert_eq!(cluster.pool(Role::Unified).spec.targets[0].revision, before);
}

fn status(cluster: &Cluster, unresolved: Option<&Unresolved>) -> LlamaDeploymentStatus {
    deployment_status(DeploymentView {
        deployment: &object(spec()),
        pools: &cluster.0.pools,
        refusal: None,
        unresolved,
        name_taken: None,
        model: None,
        scaling: ScalingView::default(),
        now: Timestamp::UNIX_EPOCH,
    })
}

fn told(status: &LlamaDeploymentStatus, type_: &str) -> [String; 3] {
    let found = status.conditions.iter().find(|found| found.type_ == type_).unwrap();
    [found.status.clone(), found.reason.clone(), found.message.clone()]
}

#[test]
fn what_runs_goes_on_until_it_is_known_what_comes_next() {
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let before = cluster.pool(Role::Unified).spec.targets[0].clone();
    let changed = from_hub(|_| {});
    cluster.pool(Role::Unified).spec.replicas = Some(2);
    let plan = cluster.pass(&changed);
    let target = cluster.pool(Role::Unified).spec.targets[0].clone();
    assert_eq!((&target.revision, target.replicas), (&before.revision, 2));
    assert!(plan.delete_revisions.is_empty() && plan.delete_pools.is_empty());
    let asking = status(&cluster, plan.unresolved.as_ref());
    assert_eq!(told(&asking, condition::READY)[0], "True");
    assert_eq!(told(&asking, condition::PROGRESSING)[..2], ["True", reason::RESOLVING]);
    assert_eq!(told(&asking, condition::DEGRADED)[0], "False");

    let words = json!({"reason": "SourceUnauthorized", "message": "hf://a/b asks who we are"}).to_string();
    let failed = json!({"terminated": {"exitCode": 1, "message": words}});
    let container = json!({"name": "resolve", "image": "w", "imageID": "", "ready": false, "restartCount": 3,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": failed});
    answers(&mut cluster, json!({"phase": "Running", "containerStatuses": [container]}));
    let plan = cluster.pass(&changed);
    assert_eq!(cluster.pool(Role::Unified).spec.targets[0], target);
    let refused = status(&cluster, plan.unresolved.as_ref());
    let quoted = ["SourceUnauthorized", "hf://a/b asks who we are"];
    assert_eq!(told(&refused, condition::READY)[..2], ["True", reason::SOME_GANGS_READY]);
    assert_eq!(told(&refused, condition::DEGRADED)[1..], quoted);
    assert_eq!(told(&refused, condition::MODEL_AVAILABLE), ["False", quoted[0], quoted[1]]);
    assert_eq!(told(&refused, condition::PROGRESSING)[..2], ["True", reason::RESOLVING]);
    // Of one that never ran.
    let nothing = status(&Cluster::default(), plan.unresolved.as_ref());
    assert_eq!(told(&nothing, condition::READY), ["False", quoted[0], quoted[1]]);
    let asking = Unresolved { source: "hf://a/b".to_owned(), trouble: None };
    let nothing = status(&Cluster::default(), Some(&asking));
    assert_eq!(told(&nothing, condition::READY)[..2], ["False", reason::RESOLVING]);
    assert_eq!(told(&nothing, condition::MODEL_AVAILABLE)[..2], ["Unknown", reason::RESOLVING]);
}

#[test]
fn a_pod_that_was_lost_is_made_anew_after_a_while() {
    let deployment = from_hub(|_| {});
    for lost in
        [json!({"phase": "Failed", "reason": "Evicted"}), ended("no answer"), ended("{\"pin\": \"../x\"}")]
    {
        let mut cluster = Cluster::default();
        cluster.pass(&deployment);
        answers(&mut cluster, lost);
        let made = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::from_second(100).unwrap());
        cluster.0.resolvers[0].metadata.creation_timestamp = Some(made);
        cluster.0.now = Timestamp::from_second(159).unwrap();
        let waits = cluster.pass(&deployment);
        assert!(waits.delete_resolvers.is_empty() && waits.unresolved.unwrap().trouble.is_some());
        cluster.0.now = Timestamp::from_second(160).unwrap();
        assert_eq!(cluster.pass(&deployment).delete_resolvers.len(), 1);
        assert!(cluster.pass(&deployment).resolve.is_some());
    }
}

#[test]
fn the_pod_that_asks_is_of_no_gang() {
    let deployment = from_hub(|spec| {
        spec["accelerator"] = json!({});
        spec["worker"] =
            json!({"nodeSelector": {"x": "y"}, "env": [{"name": "HF_ENDPOINT", "value": "http://h"}]});
    });
    let mut cluster = Cluster::default();
    cluster.pass(&deployment);
    let pod = cluster.0.resolvers[0].clone();
    // Services and pools look for this label.
    assert!(!pod.metadata.labels.as_ref().unwrap().contains_key(labels::DEPLOYMENT));
    assert!(gangs(std::slice::from_ref(&pod)).is_empty());
    let spec = pod.spec.unwrap();
    assert_eq!(spec.node_selector.unwrap()["x"], "y");
    assert_eq!(spec.tolerations.unwrap()[0].key.as_deref(), Some("nvidia.com/gpu"));
    assert_eq!(spec.automount_service_account_token, Some(false));
    let container = &spec.containers[0];
    assert_eq!(container.args.as_ref().unwrap()[0], "resolve");
    assert!(container.resources.as_ref().unwrap().limits.as_ref().unwrap().len() == 1);
    assert_eq!(secrets(container), [from_secret("HF_TOKEN", "token", false)]);
    assert_eq!(value(container, "HF_ENDPOINT"), Some("http://h"));
}

fn from_secret(variable: &str, key: &str, is_optional: bool) -> (String, String, String, bool) {
    (variable.to_owned(), "hub".to_owned(), key.to_owned(), is_optional)
}

/// Variables, the Secret and key they are from, and whether there may be none.
fn secrets(container: &Container) -> Vec<(String, String, String, bool)> {
    let variables = container.env.iter().flatten();
    let from_secret = |variable: &'_ EnvVar| {
        let key = variable.value_from.clone()?.secret_key_ref?;
        Some((key.name, key.key, key.optional == Some(true)))
    };
    variables
        .filter_map(|variable| {
            from_secret(variable)
                .map(|(secret, key, optional)| (variable.name.clone(), secret, key, optional))
        })
        .collect()
}

fn value<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    container.env.iter().flatten().find(|variable| variable.name == name)?.value.as_deref()
}

fn mount<'a>(container: &'a Container, path: &str) -> &'a VolumeMount {
    container.volume_mounts.iter().flatten().find(|mount| mount.mount_path == path).unwrap()
}

fn pod(source: &str, pin: &str, cache: ModelCache) -> Pod {
    let source = json!(source);
    pods(pin, cache, |spec| spec["model"]["source"] = source).remove(0)
}

fn pods(pin: &str, cache: ModelCache, change: impl FnOnce(&mut Value)) -> Vec<Pod> {
    let deployment = from_hub(change);
    let defaults = Defaults { worker_image: "w:1".to_owned(), model_cache: cache };
    let template = GangTemplate::new(&deployment.pools[0].gang, &defaults).with_pin(Some(pin), &defaults);
    pods_of(&deployment, &template)
}

#[test]
fn pods_bring_what_their_stage_needs() {
    let of_stages = |parallelism: Value| -> Vec<Option<String>> {
        let pods = pods(COMMIT, ModelCache::default(), |spec| spec["parallelism"] = parallelism);
        let stage = |pod: &Pod| {
            let fetch = &pod.spec.as_ref().unwrap().init_containers.as_ref().unwrap()[0];
            value(fetch, "HERD_PIPELINE")
                .zip(value(fetch, "HERD_STAGE"))
                .map(|(of, one)| format!("{one} of {of}"))
        };
        pods.iter().map(stage).collect()
    };
    assert_eq!(of_stages(json!({"tensor": 4, "ranksPerPod": 2})), [None, None]);
    let stages = ["0 of 2", "0 of 2", "1 of 2", "1 of 2"].map(|stage| Some(stage.to_owned()));
    assert_eq!(of_stages(json!({"tensor": 4, "pipeline": 2, "ranksPerPod": 2})), stages);
}

#[test]
fn the_model_is_brought_before_the_worker_starts_which_sees_no_secret() {
    let cache = ModelCache { path: Some("/var/lib/herd/models".to_owned()), size: "1Ti".to_owned() };
    let spec = pod("hf://a/b@main", COMMIT, cache).spec.unwrap();
    let volume = &spec.volumes.as_ref().unwrap()[0];
    let host_path = volume.host_path.as_ref().unwrap();
    assert_eq!(
        (host_path.path.as_str(), host_path.type_.as_deref()),
        ("/var/lib/herd/models", Some("Directory"))
    );
    let (fetch, worker) = (&spec.init_containers.as_ref().unwrap()[0], &spec.containers[0]);
    assert_eq!((fetch.name.as_str(), fetch.image.as_deref()), ("fetch", Some("w:1")));
    assert_eq!(secrets(fetch), [from_secret("HF_TOKEN", "token", false)]);
    assert_eq!(value(fetch, "HERD_MODEL_SOURCE"), Some("hf://a/b@main"));
    assert_eq!(value(fetch, "HERD_MODEL_PIN"), Some(COMMIT));
    assert_eq!(value(fetch, "HERD_CACHE_SIZE"), Some("1Ti"));
    let folder = format!("hf/a/b/{COMMIT}");
    assert_eq!(value(fetch, "HERD_CACHE_FOLDER"), Some(folder.as_str()));
    assert_eq!(mount(fetch, "/cache").read_only, None);
    assert_eq!(fetch.security_context, worker.security_context);

    assert!(secrets(worker).is_empty());
    let model = mount(worker, "/model");
    assert_eq!(model.read_only, Some(true));
    assert_eq!(model.sub_path.as_deref(), Some(format!("{folder}/model").as_str()));
    let lease = mount(worker, value(worker, "HERD_MODEL_LEASE").unwrap());
    assert_eq!(lease.sub_path.as_deref(), Some(format!("{folder}/lease").as_str()));
}

#[test]
fn a_pod_without_a_cache_of_its_node_has_one_of_its_own() {
    let spec = pod("s3://models/llama/8b", "0123abcd-17", ModelCache::default()).spec.unwrap();
    let volume = &spec.volumes.as_ref().unwrap()[0];
    assert!(volume.host_path.is_none());
    assert_eq!(volume.empty_dir.as_ref().unwrap().size_limit.as_ref().unwrap().0, "500Gi");
    let fetch = &spec.init_containers.as_ref().unwrap()[0];
    assert_eq!(
        secrets(fetch),
        [
            from_secret("AWS_ACCESS_KEY_ID", "accessKeyId", false),
            from_secret("AWS_SECRET_ACCESS_KEY", "secretAccessKey", false),
            from_secret("AWS_SESSION_TOKEN", "sessionToken", true),
            from_secret("AWS_REGION", "region", true),
            from_secret("AWS_ENDPOINT_URL", "endpoint", true),
        ]
    );
    assert_eq!(value(fetch, "HERD_CACHE_FOLDER"), Some("s3/models/0123abcd-17"));
}

/// Phase, reason and message of the gang of a pod whose first container has these states.
fn seen(state: &Value, last: &Value) -> (GangPhase, String, String) {
    let mut pod = pod("hf://a/b", COMMIT, ModelCache::default());
    pod.spec.as_mut().unwrap().node_name = Some("n1".to_owned());
    let container = json!({"name": "fetch", "image": "w", "imageID": "", "ready": false, "restartCount": 1,
        "state": state, "lastState": last});
    let status = json!({"phase": "Pending", "initContainerStatuses": [container]});
    pod.status = Some(serde_json::from_value(status).unwrap());
    let gang = gangs(&[pod]).remove(0);
    let trouble = gang.trouble.map(|trouble| (trouble.reason, trouble.message)).unwrap_or_default();
    (gang.phase, trouble.0, trouble.1)
}

#[test]
fn a_download_is_told_of_and_quoted_where_it_fails() {
    let running = json!({"running": {"startedAt": "2026-01-02T03:04:05Z"}});
    let (phase, reason, message) = seen(&running, &json!({}));
    assert_eq!((phase, reason.as_str()), (GangPhase::Starting, reason::DOWNLOADING));
    assert_eq!(message, "hf://a/b is being downloaded to n1 since 2026-01-02T03:04:05Z");
    let words = json!({"reason": "DiskFull", "message": "hf://a/b needs 7 GB more"}).to_string();
    let failed = json!({"terminated": {"exitCode": 1, "message": words}});
    for (state, last) in [(&failed, &json!({})), (&running, &failed)] {
        let (phase, reason, message) = seen(state, last);
        assert_eq!((phase, reason.as_str()), (GangPhase::CrashLooping, "DiskFull"));
        assert_eq!(message, "hf://a/b needs 7 GB more");
    }
    // That is over.
    let done = json!({"terminated": {"exitCode": 0}});
    assert_eq!(seen(&done, &failed), (GangPhase::Starting, String::new(), String::new()));
    let waiting =
        json!({"waiting": {"reason": "CreateContainerConfigError", "message": "secret \"hub\" not found"}});
    let (phase, reason, message) = seen(&waiting, &json!({}));
    assert_eq!((phase, reason.as_str()), (GangPhase::Starting, "CreateContainerConfigError"));
    assert_eq!(message, "secret \"hub\" not found");
}
