//! Gangs of several pods: one answer, one life, all or nothing on the nodes.

use anyhow::{Context as _, Result, bail, ensure};
use herd_e2e::{Fleet, Kubectl, eventually, with_fleet};
use serde_json::{Value, json};

use crate::objects::{MODEL, READY_WITHIN, condition, pods, ready, unified};
use crate::shared::golden;

/// A gang of three pods of one rank each.
fn of_three(name: &str) -> Value {
    let mut object = unified(name, MODEL, 3);
    object["spec"]["parallelism"]["ranksPerPod"] = json!(1);
    object
}

/// The same tokens, with the same seeds, as `herd serve` with all ranks in one process.
pub(crate) fn answers_right(fleet: &Fleet, model: &str) -> Result<()> {
    for (request, expected) in golden(fleet)? {
        let mut request = request.clone();
        model.clone_into(&mut request.model);
        assert_eq!(fleet.ask(&request)?, *expected, "{request:?}");
    }
    Ok(())
}

#[test]
fn a_gang_of_three_pods_answers_as_one_pod_does() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-three-pods")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&of_three("three-pods"))?;
        ready(kubectl, "three-pods")?;
        let members = kubectl.list("pods", "herd.dev/deployment=three-pods")?;
        let label = |pod: &Value, name: &str| pod["metadata"]["labels"][name].as_str().map(str::to_owned);
        let mut ranks: Vec<_> = members.iter().filter_map(|pod| label(pod, "herd.dev/rank")).collect();
        ranks.sort();
        ensure!(ranks == ["0", "1", "2"], "{ranks:?}");
        let gang = label(&members[0], "herd.dev/gang");
        ensure!(members.iter().all(|pod| label(pod, "herd.dev/gang") == gang), "more than one gang");
        answers_right(fleet, "three-pods")
    })
}

#[test]
fn a_pipeline_of_two_stages_answers_as_one_pod_does() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-stages")?;
        let kubectl = namespace.kubectl();
        let mut object = unified("stages", MODEL, 3);
        object["spec"]["parallelism"]["pipeline"] = json!(2);
        kubectl.apply(&object)?;
        ready(kubectl, "stages")?;
        let members = kubectl.list("pods", "herd.dev/deployment=stages")?;
        let rank = |pod: &Value| pod["metadata"]["labels"]["herd.dev/rank"].as_str().map(str::to_owned);
        let mut ranks: Vec<_> = members.iter().filter_map(rank).collect();
        ranks.sort();
        ensure!(ranks == ["0", "3"], "{ranks:?}");
        answers_right(fleet, "stages")
    })
}

#[test]
fn a_lost_pod_replaces_its_gang() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-lost-pod")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&of_three("lost-pod"))?;
        ready(kubectl, "lost-pod")?;
        let selector = "herd.dev/deployment=lost-pod";
        let before = pods(kubectl, selector)?;
        let (follower, _) = before.iter().find(|(name, _)| name.ends_with("-1")).context("no rank 1")?;
        kubectl.run(&["delete", "pod", follower, "--force", "--grace-period=0"])?;
        replaced(kubectl, selector, &before)?;
        ready(kubectl, "lost-pod")?;
        answers_right(fleet, "lost-pod")
    })
}

/// Waits until there are three other pods, all Ready, and none of those there were.
fn replaced(kubectl: &Kubectl, selector: &str, before: &[(String, String)]) -> Result<()> {
    eventually("another gang", READY_WITHIN, || {
        let now = kubectl.list("pods", selector)?;
        let of = |pod: &Value| pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let left = now.iter().filter(|pod| before.iter().any(|(_, uid)| *uid == of(pod))).count();
        let is_ready = |pod: &&Value| {
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            conditions.into_iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
        };
        let ready = now.iter().filter(is_ready).count();
        ensure!(left == 0 && now.len() == 3 && ready == 3, "{left} left, {ready} of {} ready", now.len());
        Ok(())
    })
}

/// Room for so many pods that ask for one of a resource that no device has: nodes say what they have.
fn room(fleet: &Fleet, resource: &str, per_node: &[u32]) -> Result<()> {
    let nodes = fleet.kubectl().list("nodes", "")?;
    ensure!(nodes.len() == per_node.len(), "{} nodes, and room for {}", nodes.len(), per_node.len());
    let path = resource.replace('/', "~1");
    for (node, count) in nodes.iter().zip(per_node) {
        let name = node["metadata"]["name"].as_str().context("a node without a name")?;
        let add = |list: &str| json!({"op": "add", "path": format!("/status/{list}/{path}"), "value": count.to_string()});
        let patch = format!("--patch={}", json!([add("capacity"), add("allocatable")]));
        fleet.kubectl().run(&["patch", "node", name, "--subresource=status", "--type=json", &patch])?;
    }
    Ok(())
}

/// Whether the scheduler gives nodes to all pods of a gang or to none, or the operator takes back what half a gang holds:
/// what is left of it is the same.
#[test]
fn a_gang_that_cannot_be_whole_is_released() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-half")?;
        let kubectl = namespace.kubectl();
        let slot = "herd.dev/e2e-slot";
        room(fleet, slot, &[1, 1])?;
        let mut object = of_three("half");
        object["spec"]["worker"]["resources"] = json!({"requests": {slot: 1}, "limits": {slot: 1}});
        kubectl.apply(&object)?;
        kubectl.watch("llamadeployment/half", READY_WITHIN, |seen| {
            let scheduled = condition(seen, "Scheduled")?;
            let says = scheduled["message"].as_str().is_some_and(|message| message.contains(slot));
            ensure!(
                scheduled["status"] == "False" && scheduled["reason"] == "Unschedulable" && says,
                "{scheduled}"
            );
            Ok(())
        })?;
        eventually("it to hold no node", READY_WITHIN, || {
            let all = kubectl.list("pods", "herd.dev/deployment=half")?;
            let held: Vec<_> = all.iter().filter(|pod| !pod["spec"]["nodeName"].is_null()).collect();
            ensure!(held.is_empty(), "{held:?}");
            Ok(())
        })?;
        room(fleet, slot, &[2, 1])?;
        ready(kubectl, "half")
    })
}

#[test]
fn ranks_per_pod_that_do_not_divide_are_refused_at_admission() -> Result<()> {
    with_fleet(|fleet| {
        let mut object = of_three("refused");
        object["spec"]["parallelism"]["ranksPerPod"] = json!(2);
        let refusal = fleet.kubectl().refusal(&object)?;
        if !refusal.contains("ranksPerPod must divide tensor") {
            bail!("{refusal}");
        }
        Ok(())
    })
}
