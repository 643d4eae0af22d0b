//! Removes what `up --context` has made.

use anyhow::Result;
use serde_json::Value;

use super::{MADE_BY, selector};
use crate::kubectl::Kubectl;
use crate::progress;
use crate::release::{self, Helm, NAMESPACE};

const DEPLOYMENTS: &str = "llamadeployments.herd.dev";
const DEFINITIONS: [&str; 2] = ["llamadeployments.herd.dev", "llamapools.herd.dev"];

/// Made by the operator itself, beside the release.
const LEASE: &str = "herd-operator";

/// Of the release's pods.
const POD_LABEL: &str = "app.kubernetes.io/instance=herd";

/// What people have in a namespace that they use.
const USED: &str = "pods,services,deployments.apps,statefulsets.apps,daemonsets.apps,replicasets.apps,jobs.batch,\
                    cronjobs.batch,persistentvolumeclaims,configmaps,secrets";

/// In every namespace, by Kubernetes.
const GIVEN: [&str; 1] = ["configmap/kube-root-ca.crt"];

/// Removes all of it that is there; what is left, and why.
pub(crate) fn remove(kubectl: &Kubectl, helm: &Helm) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    let definitions = definitions(kubectl)?;
    let others = if definitions.iter().any(|definition| definition["metadata"]["name"] == DEPLOYMENTS) {
        progress::step("example", |_| Ok(((), deployments(kubectl)?)))?;
        let left =
            kubectl.text(&["get", DEPLOYMENTS, "--all-namespaces", "--no-headers", "--ignore-not-found"])?;
        left.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join("/")).collect()
    } else {
        Vec::new()
    };
    progress::step("chart herd", |_| {
        let removed = release::uninstall(helm)?;
        Ok(((), if removed { "removed" } else { "not there" }.to_owned()))
    })?;
    let (own, foreign): (Vec<_>, Vec<_>) =
        definitions.iter().partition(|definition| is_of_the_release(definition));
    kept.extend(foreign.iter().map(|other| format!("{}, which another release has", name(other))));
    if others.is_empty() {
        progress::step("custom resources", |_| {
            for definition in &own {
                let wait = ["delete", "customresourcedefinition", name(definition), "--timeout=2m"];
                kubectl.text(&wait)?;
            }
            Ok(((), if own.is_empty() { "not there" } else { "removed" }.to_owned()))
        })?;
    } else if !own.is_empty() {
        kept.push(format!("the custom resources, since there are LlamaDeployments: {}", others.join(", ")));
    }
    kept.extend(namespace(kubectl)?);
    Ok(kept)
}

/// Definitions that are there.
fn definitions(kubectl: &Kubectl) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    for name in DEFINITIONS {
        let text =
            kubectl.text(&["get", "customresourcedefinition", name, "--ignore-not-found", "-o", "json"])?;
        if !text.is_empty() {
            found.push(serde_json::from_str(&text)?);
        }
    }
    Ok(found)
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// Whether the chart's release brought it: helm leaves such on purpose, and its mark on them.
fn is_of_the_release(definition: &Value) -> bool {
    let annotations = &definition["metadata"]["annotations"];
    annotations["meta.helm.sh/release-name"] == "herd"
        && annotations["meta.helm.sh/release-namespace"] == NAMESPACE
}

/// The example's fleet, with all that belongs to it, while there is an operator.
fn deployments(kubectl: &Kubectl) -> Result<String> {
    let selector = format!("--selector={}", selector());
    let delete = [
        "delete",
        DEPLOYMENTS,
        "--all-namespaces",
        &selector,
        "--cascade=foreground",
        "--timeout=5m",
        "-o",
        "name",
    ];
    let deleted = kubectl.text(&delete)?;
    Ok(if deleted.trim().is_empty() { "not there" } else { "removed" }.to_owned())
}

/// The release's namespace, if it was made for it and holds nothing else; why it stays.
fn namespace(kubectl: &Kubectl) -> Result<Option<String>> {
    let found = kubectl.text(&["get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "json"])?;
    if found.is_empty() {
        return Ok(None);
    }
    kubectl.text(&["-n", NAMESPACE, "delete", "lease", LEASE, "--ignore-not-found"])?;
    let found: Value = serde_json::from_str(&found)?;
    if found["metadata"]["labels"][MADE_BY.0] != MADE_BY.1 {
        return Ok(Some(format!("namespace {NAMESPACE}, which was there before")));
    }
    // Helm does not wait for pods that drain.
    let pods = ["pods", "-l", POD_LABEL];
    if !kubectl.text(&[&["-n", NAMESPACE, "get"], &pods[..], &["-o", "name"]].concat())?.is_empty() {
        kubectl.text(&[&["-n", NAMESPACE, "wait", "--for=delete", "--timeout=2m"], &pods[..]].concat())?;
    }
    let held = kubectl.text(&["-n", NAMESPACE, "get", USED, "-o", "name"])?;
    let held: Vec<&str> = held.lines().filter(|object| !GIVEN.contains(object)).collect();
    if !held.is_empty() {
        return Ok(Some(format!("namespace {NAMESPACE}, which holds {}", held.join(", "))));
    }
    progress::step(&format!("namespace {NAMESPACE}"), |_| {
        kubectl.text(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
        Ok((None, "removed".to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_definitions_of_this_release_are_its_own() {
        let definition = |release: &str, namespace: &str| {
            json!({"metadata": {"annotations": {
                "meta.helm.sh/release-name": release, "meta.helm.sh/release-namespace": namespace,
            }}})
        };
        assert!(is_of_the_release(&definition("herd", "herd-system")));
        assert!(!is_of_the_release(&definition("herd", "other")));
        assert!(!is_of_the_release(&definition("other", "herd-system")));
        assert!(!is_of_the_release(&json!({"metadata": {"name": "applied by hand"}})));
    }
}
