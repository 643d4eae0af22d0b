//! What a fleet tells of itself: metrics of every pod, the gateway's report and page, `herd status`.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Fleet, eventually, get, run, with_fleet};
use herd_metrics::{check_page, gateway, operator, worker};
use serde_json::Value;

use crate::shared::{NAME, deployed, golden};

const WITHIN: Duration = Duration::from_mins(1);

/// The page of a pod.
fn page(pod: &Value, port: u16, path: &str) -> Result<String> {
    let ip = pod["status"]["podIP"].as_str().context("a pod without an address")?;
    get(&format!("{ip}:{port}"), path)
}

/// Ids of the gangs that there are.
fn gangs(fleet: &Fleet) -> Result<BTreeSet<String>> {
    let pods = deployed(fleet)?.list("pods", &format!("herd.dev/deployment={NAME}"))?;
    let ids = pods.iter().map(|pod| pod["metadata"]["labels"]["herd.dev/gang"].as_str().map(str::to_owned));
    ids.collect::<Option<_>>().context("a pod without a gang")
}

#[test]
fn every_pod_serves_the_metrics_that_are_declared() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        for (request, answer) in golden(fleet)?.iter().take(1) {
            ensure!(fleet.ask(request)? == *answer, "another answer");
        }
        for pod in kubectl.list("pods", &format!("herd.dev/deployment={NAME}"))? {
            let page = page(&pod, 9001, "/metrics")?;
            let problems = check_page(&page, worker::METRICS, worker::ALIASES);
            ensure!(problems.is_empty(), "{problems:?}");
            ensure!(page.contains(&format!("vllm:num_requests_running{{model_name=\"{NAME}\"}}")), "{page}");
        }
        let operator_page = page(&fleet.system_pod("operator")?, 8080, "/metrics")?;
        let problems = check_page(&operator_page, operator::METRICS, &[]);
        ensure!(problems.is_empty(), "{problems:?}");
        let gateway_page = page(&fleet.system_pod("gateway")?, 8080, "/metrics")?;
        let problems = check_page(&gateway_page, gateway::METRICS, &[]);
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    })
}

#[test]
fn the_gateway_shows_the_gangs_that_there_are() -> Result<()> {
    with_fleet(|fleet| {
        deployed(fleet)?;
        ensure!(get(fleet.http(), "/")?.contains("<title>Herd</title>"), "no page");
        eventually("the gangs are in the report", WITHIN, || {
            let report: Value = serde_json::from_str(&get(fleet.http(), "/fleet.json")?)?;
            let of_model =
                report["gangs"].as_array().into_iter().flatten().filter(|gang| gang["models"][0] == NAME);
            let shown: BTreeSet<String> =
                of_model.filter_map(|gang| Some(gang["id"].as_str()?.to_owned())).collect();
            let there = gangs(fleet)?;
            ensure!(shown == there, "{shown:?} are shown, {there:?} are there");
            Ok(())
        })
    })
}

#[test]
fn herd_status_puts_cluster_and_gateway_together() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        let kubeconfig = fleet.environment().kubectl.with_file_name("kubeconfig");
        let status = |arguments: &[&str]| {
            let mut command = Command::new(&fleet.environment().herd);
            command.args(["status", NAME, "--namespace", kubectl.namespace()]).args(arguments);
            run(command.env("KUBECONFIG", &kubeconfig), "", WITHIN)?.checked()
        };
        eventually("each gang has its load", WITHIN, || {
            let shown: Value = serde_json::from_str(&status(&["-o", "json"])?)?;
            ensure!(shown.get("problem").is_none(), "{shown}");
            let pools = shown["deployments"][0]["pools"].as_array().context("no pools")?;
            let gangs: Vec<&Value> =
                pools.iter().flat_map(|pool| pool["gangs"].as_array().into_iter().flatten()).collect();
            ensure!(!gangs.is_empty(), "{shown}");
            ensure!(gangs.iter().all(|gang| gang["load"]["kv_blocks"].as_u64() > Some(0)), "{shown}");
            Ok(())
        })?;
        let text = status(&[])?;
        ensure!(text.contains("POOL") && text.contains("prefill"), "{text}");
        // A gateway that is not there leaves what the API server says.
        let text = status(&["--gateway-service", "nobody"])?;
        ensure!(text.contains("the gateway does not answer") && text.contains("Ready"), "{text}");
        Ok(())
    })
}
