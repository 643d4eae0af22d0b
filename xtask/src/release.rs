//! The release of `charts/herd` in a cluster.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::ask::Gateway;
use crate::content;
use crate::images::Images;
use crate::kubectl::Kubectl;
use crate::lock::Lock;
use crate::paths::Paths;
use crate::progress;
use crate::step::{run, run_reading};

const NAME: &str = "herd";

/// Where the operator and the gateway run.
pub(crate) const NAMESPACE: &str = "herd-system";

/// The ports of the gateway's Service: OpenAI, and gRPC.
pub(crate) const HTTP: u16 = 80;
pub(crate) const GRPC: u16 = 8081;

const DEPLOYMENTS: [&str; 2] = ["deployment/herd-operator", "deployment/herd-gateway"];

/// The local cluster's Prometheus, and an autoscaler that is as quick as it scrapes.
const SCALING: [&str; 5] = [
    "prometheus.url=http://prometheus.monitoring.svc:9090",
    "prometheus.scrapeInterval=1s",
    "autoscaler.interval=1s",
    "autoscaler.upAfter=3s",
    "autoscaler.downWindow=20s",
];

/// How long the operator and the gateway have to become ready.
const TIMEOUT: &str = "4m";

/// Helm, for one cluster.
#[derive(Debug, Clone)]
pub(crate) struct Helm {
    program: PathBuf,
    cluster: Cluster,
}

#[derive(Debug, Clone)]
enum Cluster {
    /// What helm caches is removed with it.
    Local {
        kubeconfig: PathBuf,
        home: PathBuf,
    },
    Context(String),
}

impl Helm {
    /// Of the local cluster in this folder.
    pub(crate) fn new(program: PathBuf, cluster: &Path) -> Self {
        let cluster = Cluster::Local { kubeconfig: cluster.join("kubeconfig"), home: cluster.join("helm") };
        Self { program, cluster }
    }

    /// Of a context of the kubeconfig.
    pub(crate) fn of_context(context: &str) -> Self {
        Self { program: PathBuf::from("helm"), cluster: Cluster::Context(context.to_owned()) }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).args(["--namespace", NAMESPACE]);
        match &self.cluster {
            Cluster::Local { kubeconfig, home } => {
                command.arg("--kubeconfig").arg(kubeconfig);
                for (variable, folder) in [("CACHE", "cache"), ("CONFIG", "config"), ("DATA", "data")] {
                    command.env(format!("HELM_{variable}_HOME"), home.join(folder));
                }
            }
            Cluster::Context(context) => {
                command.args(["--kube-context", context]);
            }
        }
        command
    }
}

/// Removes the release, where there is one; whether there was.
pub(crate) fn uninstall(helm: &Helm) -> Result<bool> {
    let chart = chart_of_release(helm)?;
    if chart.is_none() {
        return Ok(false);
    }
    checked(helm.command(&["uninstall", NAME, "--wait", "--timeout", TIMEOUT]))?;
    Ok(true)
}

/// The chart of the release, which must be this one, where there is one.
pub(crate) fn chart_of_release(helm: &Helm) -> Result<Option<String>> {
    let filter = format!("^{NAME}$");
    let output = helm
        .command(&["list", "--all", "--filter", &filter, "--output", "json"])
        .output()
        .context("failed to run helm")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "helm list failed: {}", errors.trim());
    let releases: Value = serde_json::from_slice(&output.stdout).context("helm list printed no JSON")?;
    let Some(chart) = releases[0]["chart"].as_str() else { return Ok(None) };
    ensure!(
        is_this_chart(chart),
        "release {NAME} in namespace {NAMESPACE} is of the chart {chart}, which is not Herd's"
    );
    Ok(Some(chart.to_owned()))
}

/// `herd-0.1.0`
fn is_this_chart(chart: &str) -> bool {
    let version = chart.strip_prefix(NAME).and_then(|rest| rest.strip_prefix('-'));
    version.is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit()))
}

/// Where the chart is.
fn chart(paths: &Paths) -> PathBuf {
    paths.root.join("charts/herd")
}

/// Installs or upgrades the release, and waits until what it deploys is ready. With the lock of its cluster, since a release that
/// another command is about to install looks like one whose helm was killed.
pub(crate) fn install(
    paths: &Paths,
    helm: &Helm,
    kubectl: &Kubectl,
    images: &Images,
    lock: &Lock,
) -> Result<()> {
    progress::step("chart herd", |activity| {
        let chart = chart(paths);
        let key = key(&chart, images)?;
        let before = status(helm);
        let what = plan(before.as_ref(), &key);
        if what == Plan::Keep && is_ready(kubectl) {
            return Ok(((), "cached".to_owned()));
        }
        if what == Plan::Replace {
            // Helm was killed half-way, and would refuse for ever.
            holding(helm.command(&["uninstall", NAME, "--wait"]), lock)?;
        }
        activity.set("helm upgrade --install");
        let mut upgrade = helm.command(&["upgrade", "--install", NAME]);
        upgrade.arg(&chart).args([
            "--create-namespace",
            "--wait",
            "--timeout",
            TIMEOUT,
            "--history-max",
            "3",
        ]);
        upgrade.args(["--description", &key]);
        for (value, image) in
            [("operator", &images.operator), ("gateway", &images.gateway), ("worker", &images.worker)]
        {
            upgrade.args(["--set-string", &format!("images.{value}={}", image.reference)]);
        }
        for value in SCALING {
            upgrade.args(["--set-string", value]);
        }
        holding(upgrade, lock)?;
        let how = match what {
            Plan::Replace => "replaced",
            Plan::Keep | Plan::Upgrade if before.is_some() => "upgraded",
            Plan::Keep | Plan::Upgrade => "installed",
        };
        Ok(((), how.to_owned()))
    })
}

/// All that decides what the release is.
fn key(chart: &Path, images: &Images) -> Result<String> {
    let sources = content::sha256_below(chart, &["."])?;
    Ok(content::sha256_of(&[&sources, &images.values(), &SCALING.join(",")]))
}

/// The release, where there is one.
fn status(helm: &Helm) -> Option<Value> {
    let output = helm.command(&["status", NAME, "--output", "json"]).output().ok()?;
    output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten()
}

#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Keep,
    Upgrade,
    Replace,
}

fn plan(release: Option<&Value>, key: &str) -> Plan {
    let Some(info) = release.map(|release| &release["info"]) else { return Plan::Upgrade };
    match info["status"].as_str().unwrap_or_default() {
        "deployed" if info["description"] == key => Plan::Keep,
        pending if pending.starts_with("pending-") || pending == "uninstalling" => Plan::Replace,
        _ => Plan::Upgrade,
    }
}

/// Whether what the release deployed is there and ready, whatever was done to it since.
fn is_ready(kubectl: &Kubectl) -> bool {
    let status = |deployment: &str| {
        kubectl.text(&["-n", NAMESPACE, "rollout", "status", deployment, "--timeout=60s"]).is_ok()
    };
    DEPLOYMENTS.into_iter().all(status)
}

/// Runs helm so that the lock is held until it ends, whatever becomes of this process.
fn holding(command: Command, lock: &Lock) -> Result<()> {
    let (success, output) = run_reading(command, lock.held_by()?, |_| {});
    ensure!(success, "{}", output.trim_end());
    Ok(())
}

fn checked(command: Command) -> Result<()> {
    let (success, output) = run(command);
    ensure!(success, "{}", output.trim_end());
    Ok(())
}

/// The gateway's Service, at an address of a local cluster that the machine reaches too.
pub(crate) fn gateway(kubectl: &Kubectl) -> Result<Gateway> {
    let service = kubectl.json(&["-n", NAMESPACE, "get", "service", "herd-gateway"])?;
    let address = service["spec"]["clusterIP"].as_str().context("service herd-gateway has no clusterIP")?;
    let address = address.parse().with_context(|| format!("clusterIP {address} of service herd-gateway"))?;
    Ok(Gateway { http: SocketAddr::new(address, HTTP), grpc: SocketAddr::new(address, GRPC) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan_of(status: &str) -> Plan {
        plan(Some(&json!({"info": {"status": status, "description": "this"}})), "this")
    }

    #[test]
    fn only_what_is_deployed_as_asked_is_kept() {
        assert_eq!(plan(None, "this"), Plan::Upgrade);
        assert_eq!(plan_of("deployed"), Plan::Keep);
        assert_eq!(plan_of("failed"), Plan::Upgrade);
        assert_eq!(
            plan(Some(&json!({"info": {"status": "deployed", "description": "other"}})), "this"),
            Plan::Upgrade
        );
    }

    #[test]
    fn a_release_of_another_chart_is_known() {
        assert!(is_this_chart("herd-0.1.0"));
        for other in ["herd-something-1.0.0", "shepherd-0.1.0", "herd"] {
            assert!(!is_this_chart(other), "{other}");
        }
    }

    #[test]
    fn a_release_that_helm_left_half_way_is_replaced() {
        for status in ["pending-install", "pending-upgrade", "pending-rollback", "uninstalling"] {
            assert_eq!(plan_of(status), Plan::Replace, "{status}");
        }
    }
}
