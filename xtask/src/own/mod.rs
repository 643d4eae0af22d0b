//! `cargo xtask up --context` and `down --context`: Herd in a cluster of one's own.
//!
//! What is made there has a label, by which it is found again: nothing else is removed.

mod checks;
mod example;
mod forward;
mod removal;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use self::checks::Cluster;
use self::forward::Forward;
use crate::images::{self, Image, Images};
use crate::kubectl::Kubectl;
use crate::lock::Lock;
use crate::oci::{self, Client, Credentials, Layout, Pushed, Registry, Target};
use crate::paths::Paths;
use crate::progress::{self, Activity};
use crate::release::{self, Helm, NAMESPACE};
use crate::{binaries, diagnostics, models, ready, up};

/// On what this makes: `KEY=VALUE`.
const MADE_BY: (&str, &str) = ("herd.dev/made-by", "xtask");

/// How long the model has: its image comes over a real network.
const READY: Duration = Duration::from_mins(15);

/// Installs Herd and SmolLM2 where they are not there already, and asks a question.
pub(crate) fn up(paths: &Paths, context: &str, registry: &Registry) -> Result<()> {
    let began = Instant::now();
    checks::programs()?;
    let lock = Lock::of_context(paths, context, "up")?;
    let (kubectl, helm) = (Kubectl::of_context(context), Helm::of_context(context));
    let cluster = Cluster::look(&kubectl, context)?;
    for warning in checks::serves(&kubectl, &cluster)? {
        println!("warning: {warning}");
    }
    release::chart_of_release(&helm)?;
    println!("{}", plan(&cluster, registry));

    let images = images::make(paths, &[models::FP8])?;
    let images = pushed(&images, registry)?;
    let release = || {
        ensure_namespace(&kubectl)?;
        release::install(paths, &helm, &kubectl, &images, &lock)?;
        serve(paths, &kubectl, &images, &cluster, began)
    };
    release().inspect_err(|_| {
        eprintln!("{}", diagnostics::collect(&kubectl, &[NAMESPACE, &cluster.namespace]));
    })
}

fn serve(paths: &Paths, kubectl: &Kubectl, images: &Images, cluster: &Cluster, began: Instant) -> Result<()> {
    let model = images.models.first().context("no model was pushed")?;
    progress::step(up::EXAMPLE, |_| Ok(((), example::apply(paths, kubectl, &cluster.namespace, model)?)))?;
    ready::wait(kubectl, up::MODEL, READY)?;
    let forward = Forward::start(kubectl)?;
    up::question(paths, forward.gateway(), began)?;
    drop(forward);
    let context = &cluster.context;
    println!(
        "\nNext:
  kubectl --context {context} get llamadeployments,llamapools,pods
  kubectl --context {context} -n {NAMESPACE} port-forward service/herd-gateway 8080:80 {grpc}:{grpc}
  {herd} chat --grpc 127.0.0.1:{grpc}
To remove it all: cargo xtask down --context {context}",
        grpc = release::GRPC,
        herd = binaries::path(paths, "herd").display(),
    );
    Ok(())
}

/// Removes what `up` has made there, and nothing else.
pub(crate) fn down(context: &str) -> Result<()> {
    checks::programs()?;
    let (kubectl, helm) = (Kubectl::of_context(context), Helm::of_context(context));
    let cluster = Cluster::look(&kubectl, context)?;
    println!(
        "removes from {cluster}: the example, the chart herd in namespace {NAMESPACE}, the custom resources"
    );
    for kept in removal::remove(&kubectl, &helm)? {
        println!("kept: {kept}");
    }
    Ok(())
}

/// What is about to happen.
fn plan(cluster: &Cluster, registry: &Registry) -> String {
    let tls = if registry.is_plain() { ", without TLS" } else { "" };
    format!(
        "{cluster}
  pushes    four images to {registry}{tls}
  installs  the chart herd, with two custom resources, in namespace {NAMESPACE}
  creates   LlamaDeployment {model} in namespace {namespace}",
        model = up::MODEL,
        namespace = cluster.namespace,
    )
}

/// The images in the registry.
fn pushed(images: &Images, registry: &Registry) -> Result<Images> {
    let client = Client::new(registry.clone(), Credentials::find(registry.host())?);
    let mut beside = None;
    for image in images.all() {
        let step = format!("push {}", image.name);
        let repository = registry.repository(&image.name);
        let pushed =
            progress::step(&step, |activity| push(&client, image, &repository, beside.as_deref(), activity));
        pushed?;
        // The programs' base layer is the same.
        beside = Some(repository);
    }
    Ok(images.moved(registry))
}

fn push(
    client: &Client,
    image: &Image,
    repository: &str,
    beside: Option<&str>,
    activity: &Activity,
) -> Result<((), String)> {
    let target = Target { repository, tag: &image.content_tag(), beside };
    let pushed = oci::push(client, &Layout::open(&image.layout), &target, &|at| activity.set(at))?;
    let how = match pushed {
        Pushed::There => "there already".to_owned(),
        Pushed::Sent(bytes) => format!("sent {}", images::megabytes(bytes)),
    };
    Ok(((), how))
}

/// The release's namespace; one that is made here is removed again.
fn ensure_namespace(kubectl: &Kubectl) -> Result<()> {
    if kubectl.text(&["get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name"])?.is_empty() {
        let (key, value) = MADE_BY;
        let namespace = serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {key: value}},
        });
        kubectl.text_of(&["create", "-f", "-"], &namespace.to_string())?;
    }
    Ok(())
}

/// A selector of what this has made.
fn selector() -> String {
    format!("{}={}", MADE_BY.0, MADE_BY.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_about_to_happen_names_the_cluster_and_the_namespaces() {
        let cluster = Cluster {
            context: "prod".to_owned(),
            server: "https://k8s.example".to_owned(),
            namespace: "models".to_owned(),
            version: "v1.35.0".to_owned(),
            minor: 35,
        };
        let plan = plan(&cluster, &Registry::parse("r.example:5000/team", true).unwrap());
        for part in [
            "context prod",
            "https://k8s.example",
            "v1.35.0",
            "r.example:5000/team, without TLS",
            "namespace herd-system",
            "namespace models",
        ] {
            assert!(plan.contains(part), "{part} is not in {plan}");
        }
    }
}
