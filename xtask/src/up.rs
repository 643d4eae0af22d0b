//! `cargo xtask up` and `down`: from a clone to an answer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::ask::Gateway;
use crate::diagnostics;
use crate::install::{self, Installed};
use crate::kubectl::Kubectl;
use crate::lock::Lock;
use crate::paths::Paths;
use crate::{ask, binaries, machine, progress, ready, release};

pub(crate) const EXAMPLE: &str = "examples/smollm2.yaml";
pub(crate) const MODEL: &str = "smollm2";
const QUESTION: &str = "What is the capital of Japan?";

/// How long the model has, from the first pull to loaded weights.
const READY: Duration = Duration::from_mins(5);

/// Brings up a cluster with Herd and SmolLM2, where they are not up already, and asks a question.
pub(crate) fn up(paths: &Paths, name: &str) -> Result<()> {
    let began = Instant::now();
    let lock = Lock::of_cluster(paths, name, "up")?;
    machine::prepare()?;
    let kubectl = Kubectl::of(&install::cluster_folder(paths, name));
    serve(paths, name, &lock, began).inspect_err(|_| {
        if kubectl.program().is_file() {
            eprintln!("{}", diagnostics::collect(&kubectl, &[]));
        }
    })
}

fn serve(paths: &Paths, name: &str, lock: &Lock, began: Instant) -> Result<()> {
    let Installed { kubectl, kubeconfig, grpcurl: _, helm: _ } = install::install(paths, name, lock)?;
    let example = paths.root.join(EXAMPLE).display().to_string();
    progress::step(EXAMPLE, |_| {
        let applied = kubectl.text(&["apply", "-f", &example])?;
        Ok(((), applied.split_whitespace().last().unwrap_or("applied").to_owned()))
    })?;
    ready::wait(&kubectl, MODEL, READY)?;
    let gateway = release::gateway(&kubectl)?;
    question(paths, gateway, began)?;
    let herd = binaries::path(paths, "herd");
    let kubectl = kubectl.program().display();
    println!(
        "\nNext:
  {kubectl} get llamadeployments,llamapools,pods
  {herd} chat --grpc {grpc}
  {herd} bench --url http://{http} --rate 8 --max-tokens 200    # pools grow, and shrink afterwards
For a kubectl or helm of your own: export KUBECONFIG={kubeconfig}
To remove it all: cargo xtask down{option}",
        herd = herd.display(),
        grpc = gateway.grpc,
        http = gateway.http,
        kubeconfig = kubeconfig.display(),
        option = if name == DEFAULT { String::new() } else { format!(" --name {name}") },
    );
    Ok(())
}

/// Asks the model a question, once the gateway serves it.
pub(crate) fn question(paths: &Paths, gateway: Gateway, began: Instant) -> Result<()> {
    ask::await_model(gateway, MODEL)?;
    let herd = binaries::path(paths, "herd");
    println!("\n> {QUESTION}");
    let asked = Instant::now();
    ask::ask(&herd, gateway, MODEL, QUESTION).context("failed to ask")?;
    println!(
        "\nanswered in {:.1} s, {:.1} s after the start",
        asked.elapsed().as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The name of the cluster unless another is given.
pub(crate) const DEFAULT: &str = "herd";

/// Removes the cluster and all it owns; it is no error that there is none.
pub(crate) fn down(paths: &Paths, name: &str) -> Result<()> {
    print!("{}", install::remove(paths, name)?);
    Ok(())
}
