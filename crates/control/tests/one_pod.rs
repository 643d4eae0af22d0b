//! The pod of a gang of one pod is, byte for byte, what the file has: a change of it is seen, and meant. The next gangs of a
//! revision get it; those that run are left as they are.

use std::error::Error;
use std::fs;
use std::path::Path;

use herd_api::{LlamaDeployment, Role};
use herd_control::revision::{Defaults, GangTemplate, ModelCache};
use herd_control::{Claims, build, validate};
use serde_json::{Value, json};

/// Nothing but what is needed, and everything that can be given.
fn specs() -> [(&'static str, Value); 2] {
    let plain = json!({
        "model": {"source": "oci://r/m:1"}, "parallelism": {"tensor": 3}, "accelerator": {"kind": "CPU"},
        "unified": {},
    });
    let full = json!({
        "model": {"source": "pvc://models/smol/fp8", "contextLength": 4096, "dtype": "f32", "servedNames": ["a", "b"]},
        "parallelism": {"tensor": 2, "pipeline": 1, "ranksPerPod": 2}, "accelerator": {"kind": "CPU"},
        "unified": {"minReplicas": 1, "maxReplicas": 2},
        "worker": {
            "image": "w:2", "env": [{"name": "HERD_KV_MEMORY", "value": "256MiB"}, {"name": "HERD_LOG_FORMAT", "value": "text"}],
            "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            "nodeSelector": {"x": "y"}, "tolerations": [{"key": "k", "operator": "Exists"}],
            "priorityClassName": "p", "terminationGracePeriodSeconds": 60,
        },
    });
    [("plain", plain), ("full", full)]
}

fn rendered(spec: &Value) -> Result<Value, Box<dyn Error>> {
    let object = json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
        "metadata": {"name": "m", "namespace": "n", "uid": "u", "creationTimestamp": "2026-01-02T00:00:00Z"},
        "spec": spec,
    });
    let object: LlamaDeployment = serde_json::from_value(object)?;
    let validated = validate(&object, &Claims::default())?;
    let template = GangTemplate::new(
        &validated.pools[0].gang,
        &Defaults { worker_image: "w:1".to_owned(), model_cache: ModelCache::default() },
    );
    let input = build::PodInput {
        deployment: "m",
        namespace: "n",
        owner: &validated.owner,
        role: Role::Unified,
        gang: "0123abcd",
        revision: "r",
        template: &template,
        pod_groups: true,
    };
    let pods = build::pods(input)?;
    assert_eq!(pods.len(), 1);
    Ok(serde_json::to_value(&pods[0])?)
}

#[test]
fn the_pod_of_a_gang_of_one_is_what_the_file_has() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/one-pod.json");
    let pods: serde_json::Map<String, Value> =
        specs().iter().map(|(name, spec)| ((*name).to_owned(), rendered(spec).unwrap())).collect();
    let text = serde_json::to_string_pretty(&pods).unwrap() + "\n";
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}
