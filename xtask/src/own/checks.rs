//! What has to be there before anything is changed.

use std::env;
use std::fmt;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::kubectl::Kubectl;
use crate::oci;

/// Programs that are run, and who says how to get them.
const PROGRAMS: [(&str, &str); 2] =
    [("kubectl", "https://kubernetes.io/docs/tasks/tools/"), ("helm", "https://helm.sh/docs/intro/install/")];

/// The first minor version of Kubernetes 1 that knows image volumes, by whatever feature gate.
const IMAGE_VOLUMES: u32 = 31;

const TIMEOUT: &str = "--request-timeout=20s";

/// A cluster, as a context names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cluster {
    pub(crate) context: String,
    pub(crate) server: String,
    /// Of the context.
    pub(crate) namespace: String,
    /// `v1.37.2`
    pub(crate) version: String,
    pub(crate) minor: u32,
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { context, server, namespace: _, version, minor: _ } = self;
        write!(f, "context {context}, {server}, Kubernetes {version}")
    }
}

/// Whether all programs are on the PATH.
pub(crate) fn programs() -> Result<()> {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &str| env::split_paths(&path).any(|folder| folder.join(program).is_file());
    match missing(is_there) {
        none if none.is_empty() => Ok(()),
        missing => bail!("not on the PATH: {}", missing.join("; ")),
    }
}

fn missing(is_there: impl Fn(&str) -> bool) -> Vec<String> {
    let missing = PROGRAMS.into_iter().filter(|(program, _)| !is_there(program));
    missing.map(|(program, how)| format!("{program} (how to get it: {how})")).collect()
}

impl Cluster {
    /// The cluster of a context, which answers.
    pub(crate) fn look(kubectl: &Kubectl, context: &str) -> Result<Self> {
        // Without a context: kubectl refuses one that is not there with fewer words.
        let names = Kubectl::of_context("").contexts()?;
        ensure!(
            names.iter().any(|name| name == context),
            "no context {context:?} in the kubeconfig; there are: {}",
            names.join(", ")
        );
        let config = kubectl.json(&["config", "view", "--minify"])?;
        let server =
            config["clusters"][0]["cluster"]["server"].as_str().context("the context has no server")?;
        let namespace = config["contexts"][0]["context"]["namespace"].as_str().unwrap_or("default");
        let versions = kubectl
            .json(&["version", TIMEOUT])
            .with_context(|| format!("the API server {server} of context {context} does not answer"))?;
        let (version, minor) = server_version(&versions)
            .with_context(|| format!("the API server {server} says no version: {versions}"))?;
        Ok(Self {
            context: context.to_owned(),
            server: server.to_owned(),
            namespace: namespace.to_owned(),
            version,
            minor,
        })
    }
}

impl Kubectl {
    fn contexts(&self) -> Result<Vec<String>> {
        let names = self.text(&["config", "get-contexts", "-o", "name"])?;
        Ok(names.lines().map(str::to_owned).collect())
    }
}

/// `v1.37.2` and 37.
fn server_version(versions: &Value) -> Option<(String, u32)> {
    let server = &versions["serverVersion"];
    let minor = server["minor"].as_str()?.trim_end_matches('+').parse().ok()?;
    Some((server["gitVersion"].as_str()?.to_owned(), minor))
}

/// Whether the cluster can serve a model of an image; what may yet be in the way.
pub(crate) fn serves(kubectl: &Kubectl, cluster: &Cluster) -> Result<Vec<String>> {
    ensure!(
        cluster.minor >= IMAGE_VOLUMES,
        "{cluster} has no image volumes, which carry the model: Kubernetes 1.{IMAGE_VOLUMES} was the first to have them"
    );
    let mut warnings = Vec::new();
    let probe = kubectl
        .text_of(&["create", "--dry-run=server", "-o", "json", TIMEOUT, "-f", "-"], &probe().to_string());
    match image_volumes(probe) {
        Ok(()) => {}
        Err(Obstacle::Off) => bail!(
            "{cluster}: image volumes, which carry the model, are off: the feature gate ImageVolume of the API server and \
             of the kubelets switches them on"
        ),
        Err(Obstacle::Unknown(why)) => {
            warnings.push(format!("cannot tell whether there are image volumes: {why:#}"));
        }
    }
    match kubectl.json(&["get", "nodes", TIMEOUT]) {
        Ok(nodes) => {
            warnings.extend(architecture(&nodes, oci::architecture())?);
            warnings.extend(runtimes(&nodes));
        }
        Err(error) => warnings.push(format!("cannot tell what nodes run: {error:#}")),
    }
    Ok(warnings)
}

#[derive(Debug)]
enum Obstacle {
    Off,
    Unknown(anyhow::Error),
}

/// A pod that no policy forbids, with an image volume.
fn probe() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "herd-image-volume-probe"},
        "spec": {
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "probe",
                "image": "probe:1",
                "resources": {"requests": {"cpu": "1m", "memory": "1Mi"}, "limits": {"cpu": "1m", "memory": "1Mi"}},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "model", "mountPath": "/model", "readOnly": true}],
            }],
            "volumes": [{"name": "model", "image": {"reference": "probe:1"}}],
        },
    })
}

/// What the API server made of the probe: it drops fields whose feature gate is off.
fn image_volumes(probe: Result<String>) -> Result<(), Obstacle> {
    let pod = match probe {
        Ok(pod) => pod,
        Err(error) if format!("{error:#}").contains("must specify a volume type") => {
            return Err(Obstacle::Off);
        }
        Err(error) => return Err(Obstacle::Unknown(error)),
    };
    let pod: Value = serde_json::from_str(&pod).map_err(|error| Obstacle::Unknown(anyhow!(error)))?;
    let volumes = pod["spec"]["volumes"].as_array();
    let kept = volumes.is_some_and(|volumes| volumes.iter().any(|volume| volume["image"].is_object()));
    if kept { Ok(()) } else { Err(Obstacle::Off) }
}

/// Whether nodes can run what is built here.
fn architecture(nodes: &Value, own: &str) -> Result<Option<String>> {
    let nodes: Vec<&Value> = nodes["items"].as_array().into_iter().flatten().collect();
    let of = |node: &&Value| node["status"]["nodeInfo"]["architecture"] == own;
    let fit = nodes.iter().filter(|node| of(node)).count();
    ensure!(
        fit > 0 || nodes.is_empty(),
        "none of the {} nodes is {own}, as the programs built here",
        nodes.len()
    );
    Ok((fit < nodes.len()).then(|| {
        format!(
            "{} of {} nodes are not {own}: pods that land there do not start",
            nodes.len() - fit,
            nodes.len()
        )
    }))
}

/// Container runtimes, and their first versions with image volumes.
const RUNTIMES: [(&str, [u32; 2]); 2] = [("containerd", [2, 1]), ("cri-o", [1, 31])];

/// Nodes whose container runtime is too old for image volumes.
fn runtimes(nodes: &Value) -> Option<String> {
    let nodes = nodes["items"].as_array()?;
    let versions =
        nodes.iter().filter_map(|node| node["status"]["nodeInfo"]["containerRuntimeVersion"].as_str());
    let mut old: Vec<&str> = versions.filter(|version| !has_image_volumes(version)).collect();
    let count = old.len();
    old.sort_unstable();
    old.dedup();
    (count > 0).then(|| {
        let old = old.join(", ");
        format!("{count} of {} nodes run {old}: image volumes need containerd 2.1 or CRI-O 1.31", nodes.len())
    })
}

/// `containerd://2.1.4`
fn has_image_volumes(version: &str) -> bool {
    let Some((name, version)) = version.split_once("://") else { return false };
    let mut numbers =
        version.trim_start_matches('v').split(['.', '-', '+']).map_while(|part| part.parse().ok());
    let version = [numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)];
    RUNTIMES.iter().any(|(runtime, first)| *runtime == name && version >= *first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_where_to_get_it() {
        assert!(missing(|_| true).is_empty());
        let one = missing(|program| program == "kubectl");
        assert_eq!(one, ["helm (how to get it: https://helm.sh/docs/intro/install/)"]);
        assert_eq!(missing(|_| false).len(), 2);
    }

    #[test]
    fn a_version_may_have_a_vendors_plus() {
        let of = |minor: &str| json!({"serverVersion": {"major": "1", "minor": minor, "gitVersion": "v1.35.1-gke.1"}, "clientVersion": {}});
        assert_eq!(server_version(&of("35+")), Some(("v1.35.1-gke.1".to_owned(), 35)));
        assert_eq!(server_version(&of("35")).map(|version| version.1), Some(35));
        assert_eq!(server_version(&json!({"clientVersion": {}})), None);
    }

    #[test]
    fn image_volumes_are_there_if_the_probe_kept_its_own() {
        assert!(image_volumes(Ok(probe().to_string())).is_ok());
        let mut dropped = probe();
        dropped["spec"]["volumes"][0] = json!({"name": "model"});
        assert!(matches!(image_volumes(Ok(dropped.to_string())), Err(Obstacle::Off)));
        let refused = anyhow!("spec.volumes[0]: Required value: must specify a volume type");
        assert!(matches!(image_volumes(Err(refused)), Err(Obstacle::Off)));
        assert!(matches!(image_volumes(Err(anyhow!("quota"))), Err(Obstacle::Unknown(_))));
    }

    #[test]
    fn programs_run_on_nodes_of_their_own_architecture() {
        let nodes = |all: &[&str]| {
            let node = |of: &&str| json!({"status": {"nodeInfo": {"architecture": of}}});
            json!({"items": all.iter().map(node).collect::<Vec<_>>()})
        };
        assert_eq!(architecture(&nodes(&["amd64", "amd64"]), "amd64").unwrap(), None);
        let some = architecture(&nodes(&["amd64", "arm64"]), "amd64").unwrap().unwrap();
        assert!(some.starts_with("1 of 2 nodes"), "{some}");
        assert!(architecture(&nodes(&["arm64"]), "amd64").is_err());
    }
    #[test]
    fn runtimes_without_image_volumes_are_named() {
        for fit in ["containerd://2.1.0", "containerd://v2.3.1-k3s1", "cri-o://1.31.0", "containerd://3.0.0"]
        {
            assert!(has_image_volumes(fit), "{fit}");
        }
        for old in
            ["containerd://1.7.27", "containerd://2.0.5", "cri-o://1.30.9", "docker://27.0.0", "containerd"]
        {
            assert!(!has_image_volumes(old), "{old}");
        }
        let node = |version: &str| json!({"status": {"nodeInfo": {"containerRuntimeVersion": version}}});
        let nodes = json!({"items": [node("containerd://2.1.0"), node("containerd://1.7.27")]});
        assert_eq!(
            runtimes(&nodes).unwrap(),
            "1 of 2 nodes run containerd://1.7.27: image volumes need containerd 2.1 or CRI-O 1.31"
        );
        assert_eq!(runtimes(&json!({"items": [node("containerd://2.1.0")]})), None);
    }
}
