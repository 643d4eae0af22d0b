//! Whose a LlamaPool is. People scale pools; they are made for LlamaDeployments alone, which say what their gangs are made from.

use herd_api::condition::{self, reason};
use herd_api::{GROUP, LlamaDeployment, LlamaPool, LlamaPoolSpec, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource as _, ResourceExt as _};

use crate::Refusal;

/// Refuses one that was not made for the LlamaDeployment that it names.
pub fn check_owner(pool: &LlamaPool) -> Result<(), Refusal> {
    let LlamaPoolSpec { deployment_ref, role, .. } = &pool.spec;
    let is_deployment = |owner: &OwnerReference| {
        let group = owner.api_version.split_once('/').map(|(group, _)| group);
        let is_kind = group == Some(GROUP) && owner.kind == LlamaDeployment::kind(&());
        is_kind && owner.controller == Some(true) && owner.name == deployment_ref.name
    };
    let is_named = pool.name_any() == names::pool(&deployment_ref.name, *role);
    if is_named && pool.owner_references().iter().any(is_deployment) {
        return Ok(());
    }
    let message = format!(
        "no LlamaDeployment {} made this LlamaPool: delete it, and apply a LlamaDeployment, which makes its pools",
        deployment_ref.name
    );
    Err(Refusal { type_: condition::READY, reason: reason::NOT_CONTROLLED, message })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn accepts(name: &str, owners: &Value) -> bool {
        let pool = json!({
            "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool", "metadata": {"name": name, "ownerReferences": owners},
            "spec": {"deploymentRef": {"name": "m"}, "role": "decode"},
        });
        check_owner(&serde_json::from_value(pool).unwrap()).is_ok()
    }

    #[test]
    fn only_the_pools_of_a_deployment_are_made() {
        let owner = json!({"apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment", "name": "m", "uid": "u",
            "controller": true});
        assert!(accepts("m-decode", &json!([owner])));
        // A version to come is of the same group.
        let with = |field: &str, value: Value| {
            let mut other = owner.clone();
            other[field] = value;
            json!([other])
        };
        assert!(accepts("m-decode", &with("apiVersion", json!("herd.dev/v1"))));
        assert!(!accepts("m-decode", &json!([])));
        assert!(!accepts("m-decode-2", &json!([owner])));
        assert!(!accepts("m-prefill", &json!([owner])));
        for (field, value) in [
            ("apiVersion", json!("apps/v1")),
            ("kind", json!("LlamaPool")),
            ("name", json!("other")),
            ("controller", json!(false)),
        ] {
            assert!(!accepts("m-decode", &with(field, value)), "{field}");
        }
    }
}
