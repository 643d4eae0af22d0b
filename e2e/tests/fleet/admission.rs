//! What the API server refuses, and with which words.

use anyhow::{Result, ensure};
use herd_e2e::with_fleet;
use serde_json::{Value, json};

use crate::objects::{MODEL, apart, unified};
use crate::shared::deployed;

fn changed(path: &str, value: Value) -> Value {
    let mut object = unified("refused", MODEL, 1);
    if let Some(field) = object.pointer_mut(path) {
        *field = value;
    }
    object
}

#[test]
fn objects_that_make_no_sense_are_refused_at_admission() -> Result<()> {
    with_fleet(|fleet| {
        let mut both = apart("refused");
        both["spec"]["unified"] = json!({});
        let bounds = json!({"minReplicas": 3, "maxReplicas": 2});
        let unknown = json!({"minReplicas": 1, "replicas": 2});
        let secret = json!({"source": "oci://r/m:1", "secretRef": {"name": "s"}});
        let named = |name: &str| json!({"source": MODEL, "servedNames": ["a", name]});
        let seen = "must be of characters that can be seen";
        let cases = [
            (changed("/spec/model", named("smol\u{200b}lm2")), seen),
            (changed("/spec/model", named("smollm2\n")), seen),
            (changed("/spec/model/source", json!("oci://r/\u{202e}m:1")), seen),
            (changed("/spec/model", secret), "secretRef is of hf:// and s3:// sources"),
            (both, "give either prefill and decode, or unified"),
            (changed("/spec/unified", bounds), "minReplicas must be at most maxReplicas"),
            (changed("/spec/parallelism/tensor", json!(0)), "spec.parallelism.tensor"),
            (changed("/spec/model/source", json!("ftp://host/model")), "model.source must be"),
            (changed("/metadata/name", json!("n".repeat(41))), "at most 40 characters"),
            (changed("/metadata/name", json!("a.b")), "must begin with a letter and have no dots"),
            (changed("/spec/autoscaling/mode", json!("Auto")), "spec.autoscaling.mode"),
            (changed("/spec/autoscaling", json!({"gpuBudget": 0})), "spec.autoscaling.gpuBudget"),
            (changed("/spec/unified", unknown), "unknown field \"spec.unified.replicas\""),
        ];
        for (object, message) in cases {
            let refusal = fleet.kubectl().refusal(&object)?;
            ensure!(refusal.contains(message), "{refusal} does not say {message:?}");
        }
        Ok(())
    })
}

#[test]
fn the_role_of_a_pool_cannot_be_changed() -> Result<()> {
    with_fleet(|fleet| {
        let patch = r#"--patch={"spec": {"role": "unified"}}"#;
        let arguments = ["patch", "llamapool", "smollm2-decode", "--type=merge", patch];
        let refused = deployed(fleet)?.finish(&arguments, "")?;
        ensure!(!refused.success && refused.err.contains("role is immutable"), "{refused:?}");
        Ok(())
    })
}
