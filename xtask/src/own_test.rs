//! The test of `up --context`, on a local cluster of its own with a registry beside it.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::herd_cluster::{HerdCluster, output};
use crate::install::Down;
use crate::kubectl::Kubectl;
use crate::lock::Lock;
use crate::paths::Paths;
use crate::progress;
use crate::step::{Outcome, Step, run, run_lanes, run_watched};
use crate::{cargo_test, cluster, diagnostics, images, install, machine, models};

/// What the cluster's name begins with, unless one is given.
const WORD: &str = "own";

/// Where the nodes look for a registry on the machine.
const REGISTRY_PORT: u16 = 5000;

const TEST: [&str; 5] = ["test", "--release", "--workspace", "--test", "own_cluster"];

/// `cargo xtask e2e --own`.
pub(crate) fn run_alone(paths: &Paths, name: Option<String>) -> ExitCode {
    run_lanes(vec![vec![step(paths, name)]])
}

/// The test as one step; the cluster is named after the clone unless a name is given.
pub(crate) fn step(paths: &Paths, name: Option<String>) -> Step<'_> {
    Step::new("own cluster", move || match machine::obstacle() {
        Some(why) => Outcome::skip(why),
        None => test(paths, &name.unwrap_or_else(|| cluster::of_clone(paths, WORD))),
    })
}

fn test(paths: &Paths, name: &str) -> Outcome {
    let _lock = match Lock::of_cluster(paths, name, "e2e --own") {
        Ok(lock) => lock,
        Err(error) => return Outcome::one(false, String::new(), format!("{error:#}\n")),
    };
    let _down = Down { paths, name };
    let mut outcome = match prepare(paths, name) {
        Ok(mut command) => {
            command.args(["--", "--test-threads=1", "--show-output"]);
            let (success, output) = run(command);
            cargo_test::outcome(success, output)
        }
        Err(error) => Outcome::one(false, String::new(), format!("{error:#}\n")),
    };
    let kubectl = Kubectl::of(&install::cluster_folder(paths, name));
    if outcome.failed > 0 && kubectl.program().is_file() {
        outcome.output += &diagnostics::collect(&kubectl, &[]);
    }
    outcome
}

/// Everything that the test needs, and the command that runs it.
fn prepare(paths: &Paths, name: &str) -> Result<Command> {
    install::remove(paths, name)?;
    // All that is compiled comes first: the probes of a cluster fail for want of a processor.
    progress::step("tests", |activity| {
        let mut compile = paths.cargo(&TEST);
        compile.arg("--no-run");
        let (success, output) = run_watched(compile, |line| activity.set(line));
        ensure!(success, "{}", output.trim_end());
        Ok(((), crate::step::compiled(&output)))
    })?;
    images::make(paths, &[models::FP8])?;
    let program = HerdCluster::build(paths)?;
    let tools = progress::quietly("tools", |_| {
        Ok([program.tool("helm")?, program.tool("registry")?, program.tool("kubernetes")?])
    })?;
    let [helm, registry, kubernetes] = tools;
    let kubectl = kubernetes.with_file_name("kubectl");
    output(program.command_with_tools(&["up", "--name", name])?).context("failed to start the cluster")?;
    let cluster = install::cluster_folder(paths, name);
    let mut command = paths.cargo(&TEST);
    command
        .env("HERD_E2E_XTASK", std::env::current_exe().context("where is this program?")?)
        .env("HERD_E2E_KUBECONFIG", cluster.join("kubeconfig"))
        // As the local cluster names it.
        .env("HERD_E2E_CONTEXT", format!("lk-{name}"))
        .env("HERD_E2E_KUBECTL", kubectl)
        .env("HERD_E2E_HELM", helm)
        .env("HERD_E2E_REGISTRY", registry)
        .env("HERD_E2E_REGISTRY_ADDRESS", registry_address(&cluster)?);
    Ok(command)
}

/// The machine's address as the cluster's nodes know it.
fn registry_address(cluster: &Path) -> Result<String> {
    let path = cluster.join("state.json");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let state: serde_json::Value = serde_json::from_str(&text).context("the cluster's state")?;
    let network = state["Network"].as_u64().context("the cluster has no network")?;
    Ok(format!("10.{}.1.1:{REGISTRY_PORT}", 100 + network))
}
