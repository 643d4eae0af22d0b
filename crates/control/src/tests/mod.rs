mod deployment;
mod gangs;
mod gpu;
mod sources;

use std::time::Duration;

use herd_api::condition::reason;
use herd_api::{LlamaDeployment, LlamaPool};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::revision::{Defaults, GangTemplate, ModelCache, hash};
use crate::{Claims, Refusal, ValidatedDeployment, build, gang, status, validate};

fn object(spec: Value) -> LlamaDeployment {
    let mut object = json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
        "metadata": {"name": "m", "namespace": "n", "uid": "u", "creationTimestamp": "2026-01-02T00:00:00Z"},
    });
    object["spec"] = spec;
    serde_json::from_value(object).unwrap()
}

fn spec() -> Value {
    json!({
        "model": {"source": "oci://r/m:1"}, "parallelism": {"tensor": 3}, "accelerator": {"kind": "CPU"},
        "unified": {"minReplicas": 1, "maxReplicas": 2},
    })
}

fn checked(change: impl FnOnce(&mut Value)) -> Result<ValidatedDeployment, Refusal> {
    let mut spec = spec();
    change(&mut spec);
    validate(&object(spec), &Claims::default())
}

#[test]
fn what_cannot_be_served_is_refused_with_its_reason() {
    let reason = |path: &str, value: Value| {
        let refused = checked(|spec| {
            let (parent, field) = path.rsplit_once('/').unwrap();
            spec.pointer_mut(parent).unwrap()[field] = value;
        });
        refused.unwrap_err().reason
    };
    assert_eq!(reason("/model/source", json!("hf://a")), reason::SOURCE_INVALID);
    assert_eq!(reason("/model/secretRef", json!({"name": "s"})), reason::SECRET_NOT_NEEDED);
    assert_eq!(reason("/model/source", json!("pvc://c/../x")), reason::SOURCE_INVALID);
    let both = json!({"resourceName": "x.io/gpu", "claimTemplateName": "c"});
    for hidden in ["a\n", "a b", "\u{200b}", "a\u{202e}b", "\u{1b}[2J", ""] {
        assert_eq!(
            reason("/model/servedNames", json!(["a", hidden])),
            reason::SERVED_NAME_INVALID,
            "{hidden:?}"
        );
        assert_eq!(
            reason("/model/source", json!(format!("oci://r/{hidden} m"))),
            reason::SOURCE_INVALID,
            "{hidden:?}"
        );
    }
    assert!(checked(|spec| spec["model"]["servedNames"] = json!(["org/Model-1.5:fp8", "模型"])).is_ok());
    assert_eq!(reason("/accelerator", both), reason::ACCELERATOR_INVALID);
    let of_a_gpu = json!({"kind": "CPU", "runtimeClassName": "nvidia"});
    assert_eq!(reason("/accelerator", of_a_gpu), reason::ACCELERATOR_INVALID);
    assert_eq!(reason("/parallelism/pipeline", json!(0)), reason::PARALLELISM_INVALID);
    for ranks in [-1, 0, 2, 4, 6] {
        assert_eq!(reason("/parallelism/ranksPerPod", json!(ranks)), reason::PARALLELISM_INVALID, "{ranks}");
    }
    assert_eq!(reason("/prefill", json!({})), reason::POOLS_INVALID);
    assert_eq!(reason("/unified/maxReplicas", json!(0)), reason::POOLS_INVALID);
    assert_eq!(reason("/autoscaling", json!({"gpuBudget": 0})), reason::SCALING_INVALID);
    for time in ["0s", "2", "soon", "1h"] {
        for field in ["timeToFirstToken", "interTokenLatency"] {
            assert_eq!(reason("/slo", json!({field: time})), reason::SCALING_INVALID, "{field} {time}");
        }
    }
    assert!(checked(|_| {}).is_ok());
}

#[test]
fn an_older_one_keeps_its_name() {
    let mut first = object(spec());
    first.metadata.uid = Some("other".to_owned());
    first.metadata.namespace = Some("elsewhere".to_owned());
    let second = object(spec());
    let claimed = |of: &LlamaDeployment| validate(of, &Claims::before(of, [&first, &second])).unwrap();
    // Of two of one age the first by namespace.
    assert_eq!(claimed(&first).served_names, ["m"]);
    assert!(claimed(&second).served_names.is_empty());
    assert!(claimed(&second).name_taken.unwrap().contains("elsewhere/m"));
}

#[test]
fn only_what_can_change_is_scaled_by_the_operator() {
    let scaled = |change: fn(&mut Value)| checked(change).unwrap();
    assert!(scaled(|_| {}).is_scaled());
    assert!(scaled(|spec| spec["autoscaling"] = json!({"mode": "SLO"})).is_scaled());
    for other in [
        |spec: &mut Value| spec["autoscaling"] = json!({"mode": "Off"}),
        |spec: &mut Value| spec["autoscaling"] = json!({"mode": "External"}),
        |spec: &mut Value| spec["unified"] = json!({"minReplicas": 2}),
    ] {
        assert!(!scaled(other).is_scaled());
    }
    let within = |change: fn(&mut Value)| scaled(change).scaling.time_to_first_token;
    assert_eq!(within(|_| {}), Duration::from_secs(10));
    assert_eq!(within(|spec| spec["slo"] = json!({"timeToFirstToken": "500ms"})), Duration::from_millis(500));
}

/// Other hashes here would replace every gang of every fleet when the operator is upgraded.
#[test]
fn the_hash_of_a_revision_is_what_it_was() {
    let hash_of = |change: fn(&mut Value)| hash(&checked(change).unwrap().pools[0].gang);
    let full = |spec: &mut Value| {
        spec["worker"] = json!({
            "env": [{"name": "A", "value": "b"}], "image": "w:1", "priorityClassName": "p",
            "nodeSelector": {"x": "y"}, "tolerations": [{"key": "k", "operator": "Exists"}],
            "resources": {"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}},
        });
    };
    let plain = hash_of(|_| {});
    assert_eq!((plain.as_str(), hash_of(full).as_str()), ("1f3996b222", "e88a5aa691"));
    // These are not of a gang.
    assert_eq!(hash_of(|spec| spec["unified"]["maxReplicas"] = json!(9)), plain);
    assert_eq!(hash_of(|spec| spec["model"]["servedNames"] = json!(["x"])), plain);
    assert_eq!(hash_of(|spec| spec["slo"] = json!({"timeToFirstToken": "2s"})), plain);
    assert_eq!(hash_of(|spec| spec["autoscaling"] = json!({"mode": "External", "gpuBudget": 8})), plain);
    assert_ne!(hash_of(|spec| spec["parallelism"]["tensor"] = json!(1)), plain);
}

/// The pods of a gang of what `change` makes of the spec.
fn pods(change: impl FnOnce(&mut Value)) -> Vec<Pod> {
    let validated = checked(change).unwrap();
    let defaults = Defaults { worker_image: "w:1".to_owned(), model_cache: ModelCache::default() };
    let template = GangTemplate::new(&validated.pools[0].gang, &defaults);
    pods_of(&validated, &template)
}

fn pods_of(validated: &ValidatedDeployment, template: &GangTemplate) -> Vec<Pod> {
    let input = build::PodInput {
        deployment: "m",
        namespace: "n",
        owner: &validated.owner,
        role: herd_api::Role::Unified,
        gang: "g",
        revision: "r",
        template,
        pod_groups: false,
    };
    build::pods(input).unwrap()
}

fn pod() -> Pod {
    pods(|_| {}).remove(0)
}

#[test]
fn what_the_operator_sets_users_may_not() {
    let one_of_several = pods(|spec| spec["parallelism"]["ranksPerPod"] = json!(1)).remove(0);
    let container = &one_of_several.spec.unwrap().containers[0];
    let names: Vec<&str> = container.env.iter().flatten().map(|variable| variable.name.as_str()).collect();
    assert!(names.contains(&"HERD_ROLE") && names.contains(&"HERD_LEADER"));
    for name in names.into_iter().filter(|name| *name != "HERD_LOG_FORMAT") {
        let refused = checked(|spec| spec["worker"] = json!({"env": [{"name": name, "value": "x"}]}));
        assert_eq!(refused.unwrap_err().reason, reason::ENV_NOT_ALLOWED, "{name}");
    }
}

/// The status of a pool with one gang, whose pod has this status.
fn seen(pod_status: Value) -> (Vec<gang::Gang>, herd_api::LlamaPoolStatus) {
    let mut pod = pod();
    if let Some(spec) = &mut pod.spec {
        spec.node_name = pod_status.get("hostIP").map(|_| "node".to_owned());
    }
    pod.status = Some(serde_json::from_value(pod_status).unwrap());
    let gangs = gang::gangs(&[pod]);
    let pool = json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool", "metadata": {"name": "m-unified", "generation": 1},
        "spec": {"deploymentRef": {"name": "m"}, "role": "unified", "targets": [{"revision": "r", "replicas": 1}]},
    });
    let pool: LlamaPool = serde_json::from_value(pool).unwrap();
    let now = Timestamp::UNIX_EPOCH;
    let view = status::PoolView { pool: &pool, gangs: &gangs, refusal: None, last_failure: None, now };
    let status = status::pool_status(view);
    (gangs, status)
}

/// Status, reason and message of a condition.
fn told(pod_status: Value, condition: &str) -> [String; 3] {
    let conditions = seen(pod_status).1.conditions;
    let found = conditions.into_iter().find(|found| found.type_ == condition).unwrap();
    [found.status, found.reason, found.message]
}

fn container(state: &Value, last: &Value) -> Value {
    let container = json!({
        "name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 1,
        "state": state, "lastState": last,
    });
    json!({"hostIP": "10.0.0.1", "phase": "Running", "containerStatuses": [container]})
}

#[test]
fn a_worker_is_quoted_also_while_it_is_started_anew() {
    let words = json!({"reason": "ImpossibleParallelism", "message": "tensor 2 cannot be"}).to_string();
    let ended = json!({"terminated": {"exitCode": 1, "message": words}});
    for status in [container(&ended, &json!({})), container(&json!({"running": {}}), &ended)] {
        assert_eq!(told(status, "Ready"), ["False", "ImpossibleParallelism", "tensor 2 cannot be"]);
    }
    let killed = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
    let [_, reason, message] = told(container(&killed, &json!({})), "Degraded");
    assert_eq!(reason, reason::WORKER_FAILED);
    assert!(message.contains("more memory than its limit"), "{message}");
    let line = json!({"timestamp": "2026-01-02T03:04:05Z", "level": "INFO", "fields": {"message": "loads 3 of 7 files"},
        "target": "herd_worker"});
    let killed = json!({"terminated": {"exitCode": 137, "reason": "Error", "message": format!("{line}\n")}});
    let [_, _, message] = told(container(&json!({"running": {}}), &killed), "Degraded");
    assert_eq!(message, "the worker was killed by signal 9 (SIGKILL); it logged last: loads 3 of 7 files");
}

#[test]
fn why_a_pod_does_not_start_is_told() {
    let waiting = json!({"waiting": {"reason": "ErrImagePull", "message": "no r/m:1"}});
    let pull = told(container(&waiting, &json!({})), "ModelAvailable");
    assert_eq!(pull, ["False", reason::IMAGE_PULL_FAILED, "no r/m:1"]);
    let unscheduled = json!({"conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}]});
    assert_eq!(told(unscheduled, "Scheduled"), ["False", reason::UNSCHEDULABLE, "0/2 nodes"]);
}

#[test]
fn a_gang_whose_pod_is_ready_is_ready() {
    let ready =
        json!({"hostIP": "h", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]});
    let (gangs, status) = seen(ready.clone());
    assert_eq!(gangs[0].address.as_deref(), Some("10.0.0.1"));
    assert_eq!((status.replicas, status.ready_replicas), (1, 1));
    assert_eq!(told(ready, "Ready"), ["True", reason::ALL_GANGS_READY, "1 gang ready"]);
}
