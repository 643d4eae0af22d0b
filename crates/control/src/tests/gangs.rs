//! Gangs of several pods: how they are made, and what is made of what their pods say.

use herd_api::condition::{self, reason};
use herd_api::{GangFailure, GangPhase, LlamaPool, LlamaPoolStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::{checked, pods};
use crate::gang::{Gang, gangs};
use crate::plan::{ObservedDeployment, plan_deployment};
use crate::revision::hash;
use crate::{build, status};

fn one_rank_a_pod(spec: &mut Value) {
    spec["parallelism"]["ranksPerPod"] = json!(1);
}

/// Name -> value; of the downward API: the path.
fn env(pod: &Pod) -> Vec<(String, String)> {
    let variables = pod.spec.iter().flat_map(|spec| spec.containers[0].env.iter().flatten());
    let value = |variable: &k8s_openapi::api::core::v1::EnvVar| {
        let from = variable.value_from.as_ref().and_then(|from| from.field_ref.clone());
        variable.value.clone().or(from.map(|from| from.field_path)).unwrap()
    };
    variables.map(|variable| (variable.name.clone(), value(variable))).collect()
}

#[test]
fn each_pod_knows_its_ranks_and_its_leader() {
    let three = pods(one_rank_a_pod);
    for (rank, pod) in three.iter().enumerate() {
        let spec = pod.spec.as_ref().unwrap();
        let name = format!("m-g-{rank}");
        assert_eq!(pod.metadata.name.as_ref(), Some(&name));
        assert_eq!(spec.hostname.as_ref(), Some(&name));
        assert_eq!(spec.subdomain.as_deref(), Some("m-ranks"));
        let labels = pod.metadata.labels.as_ref().unwrap();
        assert_eq!((labels["herd.dev/gang"].as_str(), &labels["herd.dev/rank"]), ("g", &rank.to_string()));
        assert_eq!(pod.metadata.annotations.as_ref().unwrap()["herd.dev/pods"], "3");
        let env = env(pod);
        for (name, value) in [
            ("HERD_TENSOR", "3"),
            ("HERD_RANKS_PER_POD", "1"),
            ("HERD_FIRST_RANK", &rank.to_string()),
            ("HERD_LEADER", "m-g-0.m-ranks.n.svc:9000"),
            ("HERD_RANK_BIND", "0.0.0.0:9200"),
        ] {
            assert!(env.contains(&(name.to_owned(), value.to_owned())), "{name} of {rank}: {env:?}");
        }
    }
    assert_eq!(three.len(), 3);
    // What a gang of one pod has, and no more than that, is the same in both.
    let one = env(&pods(|_| {})[0]);
    let more: Vec<String> =
        env(&three[0]).into_iter().filter(|set| !one.contains(set)).map(|(name, _)| name).collect();
    assert_eq!(more, ["HERD_RANKS_PER_POD", "HERD_FIRST_RANK", "HERD_LEADER", "HERD_RANK_BIND"]);
}

#[test]
fn each_stage_of_a_pipeline_has_pods_of_its_own() {
    let firsts = |parallelism: Value| -> Vec<String> {
        let pods = pods(|spec| spec["parallelism"] = parallelism);
        for pod in &pods {
            assert!(env(pod).contains(&("HERD_PIPELINE".to_owned(), "2".to_owned())));
        }
        pods.iter()
            .map(|pod| env(pod).into_iter().find(|(name, _)| name == "HERD_FIRST_RANK").unwrap().1)
            .collect()
    };
    assert_eq!(firsts(json!({"tensor": 4, "pipeline": 2})), ["0", "4"]);
    assert_eq!(firsts(json!({"tensor": 4, "pipeline": 2, "ranksPerPod": 2})), ["0", "2", "4", "6"]);
    assert_eq!(firsts(json!({"tensor": 1, "pipeline": 2})), ["0", "1"]);
}

#[test]
fn ports_are_those_of_the_ranks_of_the_pod() {
    let two = pods(|spec| spec["parallelism"] = json!({"tensor": 4, "ranksPerPod": 2}));
    let ports = |pod: &Pod| -> Vec<(String, i32)> {
        let ports = pod.spec.as_ref().unwrap().containers[0].ports.clone().unwrap();
        ports.into_iter().map(|port| (port.name.unwrap(), port.container_port)).collect()
    };
    let expected = |first: usize| {
        let kv = |own: usize| (format!("kv-{}", first + own), 9100 + own as i32);
        [("grpc".to_owned(), 9000), ("http".to_owned(), 9001), kv(0), kv(1), ("rank".to_owned(), 9200)]
            .to_vec()
    };
    assert_eq!(two.iter().map(ports).collect::<Vec<_>>(), [expected(0), expected(2)]);
}

#[test]
fn only_what_spreads_a_gang_changes_its_revision() {
    let of =
        |parallelism: Value| hash(&checked(|spec| spec["parallelism"] = parallelism).unwrap().pools[0].gang);
    let plain = of(json!({"tensor": 4}));
    assert_eq!(of(json!({"tensor": 4, "ranksPerPod": 4})), plain);
    assert_eq!(of(json!({"tensor": 4, "pipeline": 1})), plain);
    assert_ne!(of(json!({"tensor": 4, "pipeline": 2})), plain);
    let spread = of(json!({"tensor": 4, "ranksPerPod": 2}));
    assert_ne!(spread, plain);
    assert_ne!(of(json!({"tensor": 4, "ranksPerPod": 1})), spread);
    let refused = checked(|spec| spec["parallelism"] = json!({"tensor": 8, "ranksPerPod": 3})).unwrap_err();
    assert_eq!(refused.reason, reason::PARALLELISM_INVALID);
    assert_eq!(
        refused.message,
        "parallelism.ranksPerPod 3 must divide parallelism.tensor 8: leave it out, or set it to 2"
    );
}

#[test]
fn a_budget_lets_one_gang_go_at_a_time() {
    let budget = |change: fn(&mut Value)| {
        let mut deployment = checked(change).unwrap();
        deployment.pools[0].min_replicas = 2;
        let plan = plan_deployment(&deployment, &ObservedDeployment::default());
        let spec = build::disruption_budget(&deployment, &plan.pools[0]).spec.unwrap();
        (spec.max_unavailable, spec.min_available)
    };
    assert_eq!(budget(|_| {}), (Some(IntOrString::Int(1)), None));
    // Two gangs of three pods: all of them but one.
    assert_eq!(budget(one_rank_a_pod), (None, Some(IntOrString::Int(5))));
}

/// A gang of three pods, which say this.
fn said(statuses: [Value; 3]) -> Vec<Pod> {
    let mut pods = pods(one_rank_a_pod);
    for (pod, status) in pods.iter_mut().zip(statuses) {
        pod.spec.as_mut().unwrap().node_name = status.get("podIP").map(|_| "node".to_owned());
        pod.status = Some(serde_json::from_value(status).unwrap());
    }
    pods
}

fn ready(ip: &str) -> Value {
    json!({"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]})
}

fn crashed(reason: &str, message: &str) -> Value {
    let words = json!({"reason": reason, "message": message}).to_string();
    let state = json!({"terminated": {"exitCode": 1, "message": words}});
    json!({"podIP": "1", "containerStatuses": [{"name": "worker", "image": "w", "imageID": "", "ready": false,
        "restartCount": 2, "lastState": state}]})
}

fn no_node() -> Value {
    json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}]})
}

fn only(pods: &[Pod]) -> Gang {
    let [gang] = <[Gang; 1]>::try_from(gangs(pods)).unwrap();
    gang
}

#[test]
fn a_gang_is_what_its_worst_pod_is() {
    let whole = only(&said([ready("10.0.0.1"), ready("10.0.0.2"), ready("10.0.0.3")]));
    assert_eq!((whole.phase, whole.address.as_deref()), (GangPhase::Ready, Some("10.0.0.1")));
    let loads = only(&said([ready("1"), ready("2"), json!({"podIP": "3"})]));
    assert_eq!(loads.phase, GangPhase::Starting);
    let waits = only(&said([ready("1"), json!({"podIP": "2"}), no_node()]));
    assert_eq!(waits.phase, GangPhase::Pending);
    assert_eq!(waits.trouble.unwrap().message, "0/2 nodes are available");
    let refused = |message: &str| json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]});
    let group = only(&said([refused("2 of 3 found one"), refused("2 of 3 found one"), no_node()]));
    assert_eq!(group.trouble.unwrap().message, "0/2 nodes are available; 2 of 3 found one");
    // The follower's word is the only one there is, and says whose it is.
    let crashes = only(&said([ready("1"), crashed("ModelUnreadable", "no such file"), no_node()]));
    assert_eq!((crashes.phase, crashes.restarts), (GangPhase::CrashLooping, 2));
    assert_eq!(crashes.trouble.unwrap().message, "the pod of rank 1: no such file");
    // The leader knows of its followers.
    let both = only(&said([crashed("Epoch", "rank 1 is gone"), crashed("X", "x"), ready("3")]));
    assert_eq!(both.trouble.unwrap().message, "rank 1 is gone");
}

#[test]
fn a_gang_that_lacks_a_pod_is_not_ready() {
    let all = said([ready("1"), ready("2"), ready("3")]);
    let lacks = only(&all[..2]);
    assert_eq!(lacks.phase, GangPhase::Failed);
    assert_eq!(lacks.trouble.unwrap().reason, reason::GANG_INCOMPLETE);
    // Without its leader it is what is left of one that went.
    assert_eq!(only(&all[1..]).phase, GangPhase::Draining);
}

/// Kubernetes says of the pods of a node that it lost that they are not Ready, and some time later deletes them. None of them ends:
/// nobody is there to say so.
#[test]
fn what_a_lost_leader_leaves_behind_is_not_held_for_its_grace_period() {
    let gone_by = |status: &str, since: &str| {
        let condition = json!({"type": "Ready", "status": status, "lastTransitionTime": since});
        let mut pods = said([json!({"podIP": "1", "conditions": [condition]}), ready("2"), ready("3")]);
        pods[0].metadata.deletion_timestamp = Some(Time("2026-01-02T01:10:00Z".parse().unwrap()));
        pods[0].metadata.deletion_grace_period_seconds = Some(600);
        let gang = only(&pods);
        assert_eq!(gang.phase, GangPhase::Draining);
        gang.leader().unwrap().gone_by.unwrap().to_string()
    };
    let (deleted, end) = ("2026-01-02T01:00:00Z", "2026-01-02T01:10:00Z");
    assert_eq!(gone_by("False", "2026-01-02T00:59:30Z"), deleted);
    // It drains.
    assert_eq!(gone_by("True", "2026-01-02T00:30:00Z"), end);
    assert_eq!(gone_by("False", deleted), end);
    assert_eq!(gone_by("False", "2026-01-02T01:00:05Z"), end);
}

fn pool_status(gangs: &[Gang], last_failure: Option<&GangFailure>, replicas: i32) -> LlamaPoolStatus {
    let pool = json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool", "metadata": {"name": "m-unified", "generation": 1},
        "spec": {"deploymentRef": {"name": "m"}, "role": "unified",
            "targets": [{"revision": "r", "replicas": replicas}]},
    });
    let pool: LlamaPool = serde_json::from_value(pool).unwrap();
    let now = Timestamp::UNIX_EPOCH;
    status::pool_status(status::PoolView { pool: &pool, gangs, refusal: None, last_failure, now })
}

fn told<'a>(status: &'a LlamaPoolStatus, type_: &str) -> [&'a str; 3] {
    let found = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
    [&found.status, &found.reason, &found.message]
}

#[test]
fn a_gang_that_was_given_up_is_told_of_until_the_next_one_is_made() {
    let failure = |reason: &str| GangFailure {
        revision: "r".to_owned(),
        since: Time(Timestamp::UNIX_EPOCH),
        time: Time(Timestamp::UNIX_EPOCH),
        reason: reason.to_owned(),
        message: "why".to_owned(),
    };
    let released = failure(reason::UNSCHEDULABLE);
    let nothing = pool_status(&[], Some(&released), 1);
    assert_eq!(told(&nothing, condition::SCHEDULED), ["False", reason::UNSCHEDULABLE, "why"]);
    assert_eq!(told(&nothing, condition::DEGRADED)[0], "False");
    assert_eq!(nothing.last_failure.as_ref(), Some(&released));
    let lost = failure(reason::GANG_INCOMPLETE);
    assert_eq!(
        told(&pool_status(&[], Some(&lost), 1), condition::DEGRADED),
        ["True", "GangIncomplete", "why"]
    );
    // A gang that lacks the pod that was refused does not hide why.
    let refused = failure(reason::FAILED_CREATE);
    let lacks = only(&said([json!({"podIP": "1"}), json!({"podIP": "2"}), json!({"podIP": "3"})])[..2]);
    for gangs in [&[][..], &[lacks]] {
        let status = pool_status(gangs, Some(&refused), 1);
        assert_eq!(told(&status, condition::READY), ["False", "FailedCreate", "why"]);
        assert_eq!(told(&status, condition::DEGRADED), ["True", "FailedCreate", "why"]);
    }
    // The next one has words of its own; what was is kept for as long as it may be given up as well.
    let starts = only(&said([json!({"podIP": "1"}), json!({"podIP": "2"}), json!({"podIP": "3"})]));
    let next = pool_status(&[starts], Some(&lost), 1);
    assert_eq!(told(&next, condition::DEGRADED)[0], "False");
    assert!(next.last_failure.is_some());
    let whole = only(&said([ready("1"), ready("2"), ready("3")]));
    assert_eq!(pool_status(&[whole], Some(&lost), 1).last_failure, None);
}
