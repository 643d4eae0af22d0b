//! How long the pods of a gang stay bound to a node that is lost.

use k8s_openapi::api::core::v1::Toleration;

/// Of a node that nothing was heard of: Kubernetes has waited for some 50 seconds by then. Without one of its pods a gang serves
/// nothing, and what the others hold is idle: the 300 seconds that pods have otherwise would be an outage of six minutes.
const UNREACHABLE_SECONDS: i64 = 30;
/// Of a node that says itself that it is not ready: mostly its container runtime or network starts anew, while what runs on it
/// goes on. To load a model elsewhere takes longer than to wait for that.
const NOT_READY_SECONDS: i64 = 60;

/// The user's, and these where the user has said nothing of such nodes.
pub(super) fn with_lost_nodes(of_user: &[Toleration]) -> Vec<Toleration> {
    let lost = [
        ("node.kubernetes.io/not-ready", NOT_READY_SECONDS),
        ("node.kubernetes.io/unreachable", UNREACHABLE_SECONDS),
    ];
    let unsaid = lost.into_iter().filter(|(taint, _)| !of_user.iter().any(|one| bears(one, taint)));
    of_user.iter().cloned().chain(unsaid.map(|(taint, seconds)| for_seconds(taint, seconds))).collect()
}

fn for_seconds(taint: &str, seconds: i64) -> Toleration {
    Toleration {
        key: Some(taint.to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        toleration_seconds: Some(seconds),
        value: None,
    }
}

/// As Kubernetes reads it: no key is every key, no effect every effect. These taints have no value.
fn bears(toleration: &Toleration, taint: &str) -> bool {
    let Toleration { effect, key, operator: _, toleration_seconds: _, value: _ } = toleration;
    let is_or_all = |field: &Option<String>, word: &str| {
        field.as_deref().is_none_or(|field| field.is_empty() || field == word)
    };
    is_or_all(key, taint) && is_or_all(effect, "NoExecute")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn seconds(of_user: &Value) -> Vec<(String, Option<i64>)> {
        let of_user: Vec<Toleration> = serde_json::from_value(of_user.clone()).unwrap();
        let of_pod = with_lost_nodes(&of_user);
        assert_eq!(of_pod[..of_user.len()], of_user);
        let word = |key: &str| key.trim_start_matches("node.kubernetes.io/").to_owned();
        let added = of_pod[of_user.len()..].iter();
        added.map(|one| (word(one.key.as_deref().unwrap()), one.toleration_seconds)).collect()
    }

    #[test]
    fn a_lost_node_is_given_up_within_a_minute() {
        let both = [("not-ready".to_owned(), Some(60)), ("unreachable".to_owned(), Some(30))];
        assert_eq!(seconds(&json!([])), both);
        assert_eq!(seconds(&json!([{"key": "x", "operator": "Exists"}])), both);
        let unscheduled =
            json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule", "operator": "Exists"}]);
        assert_eq!(seconds(&unscheduled), both);
    }

    #[test]
    fn what_a_user_said_of_lost_nodes_stands() {
        let own = |key: &str| json!([{"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 900}]);
        assert_eq!(seconds(&own("node.kubernetes.io/not-ready")), [("unreachable".to_owned(), Some(30))]);
        assert_eq!(seconds(&own("node.kubernetes.io/unreachable")), [("not-ready".to_owned(), Some(60))]);
        assert_eq!(seconds(&json!([{"operator": "Exists"}])), []);
        assert_eq!(seconds(&json!([{"operator": "Exists", "effect": "NoSchedule"}])).len(), 2);
    }
}
