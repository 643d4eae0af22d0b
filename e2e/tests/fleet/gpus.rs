//! Pods with GPUs: the local cluster has two a node, of a real device plugin, that are names only.

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{eventually, with_fleet};
use serde_json::{Value, json};

use crate::gangs::answers_right;
use crate::objects::{MODEL, READY_WITHIN, ready, unified, wait_for};

const GPU: &str = "nvidia.com/gpu";

/// As users write it who say nothing of accelerators.
fn on_gpus(name: &str, tensor: i32) -> Result<Value> {
    let mut object = unified(name, MODEL, tensor);
    let spec = object["spec"].as_object_mut().context("no spec")?;
    spec.remove("accelerator").context("no accelerator")?;
    Ok(object)
}

#[test]
fn a_gang_that_fits_on_no_node_says_so_and_can_be_spread() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-too-big")?;
        let kubectl = namespace.kubectl();
        let nodes = fleet.kubectl().list("nodes", "")?;
        let gpus: Vec<_> = nodes.iter().map(|node| &node["status"]["allocatable"][GPU]).collect();
        ensure!(gpus == ["2", "2"], "{gpus:?}");
        let mut object = on_gpus("too-big", 3)?;
        // Nothing can compute on a device that is a name.
        object["spec"]["worker"]["env"] = json!([
            {"name": "HERD_KV_MEMORY", "value": "256MiB"}, {"name": "HERD_BACKEND", "value": "cpu"},
        ]);
        kubectl.apply(&object)?;
        let deployment = "llamadeployment/too-big";
        let message = wait_for(kubectl, deployment, "Scheduled", "False", Some("Unschedulable"))?;
        let says = format!("needs 3 {GPU} on one node; the best node has 2");
        ensure!(message.contains(&says), "{message}");
        object["spec"]["parallelism"]["ranksPerPod"] = json!(1);
        kubectl.apply(&object)?;
        ready(kubectl, "too-big")?;
        let pods = kubectl.list("pods", "herd.dev/deployment=too-big")?;
        let limits: Vec<_> =
            pods.iter().map(|pod| &pod["spec"]["containers"][0]["resources"]["limits"][GPU]).collect();
        ensure!(limits == ["1", "1", "1"], "{limits:?}");
        answers_right(fleet, "too-big")
    })
}

#[test]
fn a_worker_without_a_device_is_quoted() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-no-device")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&on_gpus("no-device", 1)?)?;
        let message = wait_for(kubectl, "llamadeployment/no-device", "Ready", "False", Some("NoDevice"))?;
        ensure!(message.contains("libcuda.so.1"), "{message}");
        eventually("a condition of the pool too", READY_WITHIN, || {
            let pool = kubectl.get("llamapool/no-device-unified")?;
            ensure!(pool["status"].to_string().contains("libcuda.so.1"), "{}", pool["status"]);
            Ok(())
        })
    })
}
