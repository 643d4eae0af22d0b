//! What cannot be served says so, in a sentence.

use anyhow::{Result, ensure};
use herd_e2e::with_fleet;
use serde_json::json;

use crate::objects::{MODEL, ready, unified, wait_for};

#[test]
fn a_hub_that_cannot_be_reached_is_told_and_nothing_is_made() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-no-hub")?;
        let kubectl = namespace.kubectl();
        // The object that the documentation begins with.
        kubectl.apply(&json!({
            "apiVersion": "herd.dev/v1alpha1",
            "kind": "LlamaDeployment",
            "metadata": {"name": "llama-405b"},
            "spec": {
                "model": {"source": "hf://meta-llama/Llama-3.1-405B-Instruct-FP8"},
                "parallelism": {"tensor": 8},
                // Pods of GPUs are made where GPUs are: this one asks from anywhere.
                "accelerator": {"kind": "CPU"},
                "slo": {"timeToFirstToken": "2s", "interTokenLatency": "50ms"},
                "prefill": {"minReplicas": 1, "maxReplicas": 4},
                "decode": {"minReplicas": 2, "maxReplicas": 8},
            },
        }))?;
        let object = "llamadeployment/llama-405b";
        let message = wait_for(kubectl, object, "ModelAvailable", "False", Some("SourceUnreachable"))?;
        ensure!(message.contains("hf://meta-llama/Llama-3.1-405B-Instruct-FP8"), "{message}");
        let made = kubectl.list("llamapools,services,controllerrevisions", "")?;
        ensure!(made.is_empty(), "{made:?}");
        Ok(())
    })
}

#[test]
fn an_impossible_parallelism_is_quoted_and_can_be_corrected() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-impossible")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&unified("impossible", MODEL, 2))?;
        let object = "llamadeployment/impossible";
        let message = wait_for(kubectl, object, "Ready", "False", Some("ImpossibleParallelism"))?;
        ensure!(message.contains("tensor 2 cannot split 9 attention heads"), "{message}");
        kubectl.apply(&unified("impossible", MODEL, 3))?;
        ready(kubectl, "impossible")
    })
}

#[test]
fn an_image_that_is_not_there_is_named() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-image")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&unified("nowhere", "oci://lk.local/nowhere:1", 1))?;
        let object = "llamadeployment/nowhere";
        let message = wait_for(kubectl, object, "ModelAvailable", "False", Some("ImagePullFailed"))?;
        ensure!(message.contains("lk.local/nowhere:1"), "{message}");
        Ok(())
    })
}

#[test]
fn a_name_that_two_claim_is_the_elders() -> Result<()> {
    with_fleet(|fleet| {
        let (older, younger) = (fleet.namespace("e2e-older")?, fleet.namespace("e2e-younger")?);
        let named = |name: &str| {
            let mut object = unified(name, MODEL, 1);
            object["spec"]["model"]["servedNames"] = json!(["twice"]);
            object
        };
        older.kubectl().apply(&named("elder"))?;
        ready(older.kubectl(), "elder")?;
        younger.kubectl().apply(&named("junior"))?;
        let object = "llamadeployment/junior";
        let message = wait_for(younger.kubectl(), object, "Ready", "False", Some("ServedNameTaken"))?;
        ensure!(message.contains("e2e-older/elder") && message.contains("\"twice\""), "{message}");
        ensure!(younger.kubectl().list("pods", "")?.is_empty(), "pods without a name to serve");
        older.kubectl().run(&["delete", "llamadeployment", "elder"])?;
        ready(younger.kubectl(), "junior")
    })
}
