//! What users apply, and what they look for in what they get back.

use anyhow::{Context as _, Result, bail, ensure};
use herd_e2e::Kubectl;
use serde_json::{Value, json};
use std::time::Duration;

/// Image of the FP8 checkpoint.
pub(crate) const MODEL: &str = "oci://lk.local/smollm2-135m-fbgemm-fp8:1";
/// Names of pods and of all that a deployment is made of.
pub(crate) const KINDS: &str =
    "llamapools,pods,services,endpointslices,controllerrevisions,poddisruptionbudgets";
/// For pods to be made, pulled, loaded and found.
pub(crate) const READY_WITHIN: Duration = Duration::from_mins(3);

/// A deployment of gangs that do both roles, as many as tests ask for.
pub(crate) fn unified(name: &str, source: &str, tensor: i32) -> Value {
    json!({
        "apiVersion": "herd.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": source},
            "parallelism": {"tensor": tensor},
            "accelerator": {"kind": "CPU"},
            "unified": {"minReplicas": 1, "maxReplicas": 2},
            "autoscaling": {"mode": "Off"},
            "worker": {"env": [{"name": "HERD_KV_MEMORY", "value": "256MiB"}]},
        },
    })
}

/// A deployment of one prefill and one decode gang, or two.
pub(crate) fn apart(name: &str) -> Value {
    let mut object = unified(name, MODEL, 3);
    let pool = object["spec"]["unified"].take();
    if let Some(spec) = object["spec"].as_object_mut() {
        spec.remove("unified");
        spec.insert("prefill".to_owned(), pool.clone());
        spec.insert("decode".to_owned(), pool);
    }
    object
}

/// A condition of an object, if it is about the object as it is.
pub(crate) fn condition<'a>(object: &'a Value, type_: &str) -> Result<&'a Value> {
    let found = object["status"]["conditions"].as_array().into_iter().flatten();
    let condition = found.into_iter().find(|condition| condition["type"] == type_);
    let condition = condition.with_context(|| format!("no condition {type_}: {}", object["status"]))?;
    ensure!(
        condition["observedGeneration"] == object["metadata"]["generation"],
        "condition {type_} is of another generation: {condition}"
    );
    Ok(condition)
}

/// Waits until a condition has this status and reason; its message.
pub(crate) fn wait_for(
    kubectl: &Kubectl,
    object: &str,
    type_: &str,
    status: &str,
    reason: Option<&str>,
) -> Result<String> {
    kubectl.watch(object, READY_WITHIN, |seen| {
        let condition = condition(seen, type_)?;
        if condition["status"] != status || reason.is_some_and(|reason| condition["reason"] != reason) {
            bail!("{condition}");
        }
        Ok(condition["message"].as_str().unwrap_or_default().to_owned())
    })
}

/// Waits until it serves.
pub(crate) fn ready(kubectl: &Kubectl, name: &str) -> Result<()> {
    wait_for(kubectl, &format!("llamadeployment/{name}"), "Ready", "True", None).map(drop)
}

/// Waits until a pool has exactly this many gangs, all ready, and none that drains.
pub(crate) fn settled(kubectl: &Kubectl, pool: &str, gangs: i64) -> Result<()> {
    kubectl.watch(&format!("llamapool/{pool}"), READY_WITHIN, |seen| {
        let status = &seen["status"];
        ensure!(
            status["observedGeneration"] == seen["metadata"]["generation"]
                && status["replicas"] == gangs
                && status["readyReplicas"] == gangs
                && status["drainingReplicas"] == 0,
            "{status}"
        );
        Ok(())
    })
}

/// Name and uid of each pod that a selector finds.
pub(crate) fn pods(kubectl: &Kubectl, selector: &str) -> Result<Vec<(String, String)>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pods = kubectl.list("pods", selector)?;
    Ok(pods.iter().map(|pod| (text(&pod["metadata"]["name"]), text(&pod["metadata"]["uid"]))).collect())
}
