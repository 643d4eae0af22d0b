//! A folder of each node for downloaded models, which its pods share.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Fleet, Kubectl, Namespace, eventually, run, with_fleet};
use serde_json::{Value, json};

use crate::hub::REPOSITORY;
use crate::objects::{READY_WITHIN, pods, ready, wait_for};
use crate::shared::golden;
use crate::sources::{COMMIT, LATER, Machine, TOKEN, secret};

/// Room for the checkpoint, which has 195 MiB, and not for a second one.
const SIZE: &str = "250Mi";
const NODE: &str = "n1";
/// For an operator to take over from the one before, and for the folders to be prepared.
const UPGRADED_WITHIN: Duration = Duration::from_mins(2);

/// The chart with a folder of each node, until this is dropped.
struct NodeCache<'a>(&'a Fleet);

impl<'a> NodeCache<'a> {
    /// Nothing of an earlier run is in it.
    fn install(fleet: &'a Fleet) -> Result<Self> {
        let installed = Self(fleet);
        installed.upgrade(&format!("/var/lib/herd/models-{}", std::process::id()), SIZE)?;
        Ok(installed)
    }

    fn upgrade(&self, path: &str, size: &str) -> Result<()> {
        let environment = self.0.environment();
        let cluster = environment.kubectl.parent().context("the cluster has no folder")?;
        let mut helm = Command::new(&environment.helm);
        helm.args(["upgrade", "herd"]).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/herd"));
        helm.args(["--namespace", "herd-system", "--reuse-values", "--wait", "--timeout", "100s"]);
        for value in [format!("modelCache.path={path}"), format!("modelCache.size={size}")] {
            helm.args(["--set-string", &value]);
        }
        helm.arg("--kubeconfig").arg(cluster.join("kubeconfig"));
        for (variable, folder) in [("CACHE", "cache"), ("CONFIG", "config"), ("DATA", "data")] {
            helm.env(format!("HELM_{variable}_HOME"), cluster.join("helm").join(folder));
        }
        run(&mut helm, "", UPGRADED_WITHIN)?.checked().context("helm upgrade")?;
        // Helm does not wait until the one before is gone.
        eventually("one operator", READY_WITHIN, || self.0.system_pod("operator").map(drop))
    }
}

impl Drop for NodeCache<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.upgrade("", "500Gi") {
            eprintln!("cannot take the models' folders from the chart: {error:#}");
        }
    }
}

fn on_one_node(mut object: Value, gangs: i64, env: &[(&str, &str)]) -> Value {
    object["spec"]["unified"] = json!({"minReplicas": gangs, "maxReplicas": gangs});
    object["spec"]["worker"]["nodeSelector"] = json!({"kubernetes.io/hostname": NODE});
    if let Some(all) = object["spec"]["worker"]["env"].as_array_mut() {
        all.extend(env.iter().map(|(name, value)| json!({"name": name, "value": value})));
    }
    object
}

/// How often each file of a commit was sent.
fn sent(machine: &Machine, commit: &str) -> BTreeMap<String, usize> {
    let mut sent = BTreeMap::new();
    for request in machine.hub.content.seen() {
        if let Some(name) = request.path().strip_prefix(&format!("/{commit}/")) {
            *sent.entry(name.to_owned()).or_default() += 1;
        }
    }
    sent
}

fn asked(machine: &Machine) -> usize {
    machine.hub.api.seen().len() + machine.hub.content.seen().len()
}

fn answers(fleet: &Fleet, model: &str) -> Result<()> {
    let (request, expected) = golden(fleet)?.first().context("no request")?;
    let mut request = request.clone();
    model.clone_into(&mut request.model);
    assert_eq!(fleet.ask(&request)?, *expected);
    Ok(())
}

fn log_of_fetch(kubectl: &Kubectl, pod: &str) -> Result<String> {
    kubectl.run(&["logs", pod, "--container=fetch"])
}

/// Two pods on one node, one after another, a model that has no room beside theirs, and then has it.
#[test]
fn pods_of_a_node_share_a_download_that_goes_for_another() -> Result<()> {
    with_fleet(|fleet| {
        let machine = Machine::start(fleet)?;
        {
            let mut state = machine.hub.state.lock().unwrap_or_else(PoisonError::into_inner);
            let files = state.commits.get(COMMIT).context("no files")?.clone();
            state.commits.insert(LATER.to_owned(), files);
        }
        let _cache = NodeCache::install(fleet)?;
        let namespace = Namespace::under(fleet.kubectl(), "e2e-cache", "privileged")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&secret("hub", TOKEN))?;

        // Both ask for it at once.
        kubectl.apply(&on_one_node(machine.deployment("older", "hub"), 2, &[]))?;
        kubectl.watch("llamapool/older-unified", READY_WITHIN, |seen| {
            ensure!(seen["status"]["readyReplicas"] == 2, "{}", seen["status"]);
            Ok(())
        })?;
        for pod in kubectl.list("pods", "herd.dev/rank=0")? {
            ensure!(pod["spec"]["nodeName"] == NODE, "{}", pod["spec"]["nodeName"]);
        }
        let once = sent(&machine, COMMIT);
        ensure!(once.contains_key("model.safetensors") && once.values().all(|times| *times == 1), "{once:?}");
        // One that comes later asks for nothing at all.
        let before = asked(&machine);
        let gangs = pods(kubectl, "herd.dev/rank=0")?;
        let (lost, _) = gangs.first().context("no pod")?;
        kubectl.run(&["delete", "pod", lost, "--wait=false"])?;
        eventually("a pod in its place", READY_WITHIN, || {
            let status = &kubectl.get("llamapool/older-unified")?["status"];
            ensure!(status["readyReplicas"] == 2 && status["drainingReplicas"] == 0, "{status}");
            let now = pods(kubectl, "herd.dev/rank=0")?;
            ensure!(now.len() == 2 && now != gangs, "{now:?}");
            Ok(())
        })?;
        assert_eq!(asked(&machine), before);
        answers(fleet, "older")?;

        // There is no room for another one while it is in use, however long ago that began.
        let mut newer = on_one_node(machine.deployment("newer", "hub"), 1, &[("HERD_CACHE_GRACE", "0")]);
        newer["spec"]["model"]["source"] = json!(format!("hf://{REPOSITORY}@{LATER}"));
        kubectl.apply(&newer)?;
        let full = Some("ModelCacheFull");
        let message = wait_for(kubectl, "llamadeployment/newer", "ModelAvailable", "False", full)?;
        let folder = format!("hf/{REPOSITORY}/{COMMIT}");
        ensure!(message.contains(&folder), "{message}");
        ensure!(!sent(&machine, LATER).contains_key("model.safetensors"), "weights without room");

        kubectl.run(&["delete", "llamadeployment", "older", "--cascade=foreground", "--timeout=50s"])?;
        // A new pod tries at once, an old one later and later.
        kubectl.run(&["delete", "pods", "--selector=herd.dev/deployment=newer", "--wait=false"])?;
        ready(kubectl, "newer")?;
        let now = pods(kubectl, "herd.dev/deployment=newer,herd.dev/rank=0")?;
        let (pod, _) = now.first().context("no pod")?;
        let log = log_of_fetch(kubectl, pod)?;
        let removed = log.lines().any(|line| line.contains("removed to make room") && line.contains(&folder));
        ensure!(removed, "{log}");
        answers(fleet, "newer")
    })
}
