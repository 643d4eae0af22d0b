//! The operator process: makes a fleet of each LlamaDeployment.

mod apply;
mod autoscale;
mod context;
mod controllers;
mod deployment;
mod describe;
mod error;
#[cfg(test)]
mod fake_api;
mod http;
mod lease;
mod metrics;
mod nodes;
mod pool;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use herd_api::{LlamaDeployment, LlamaPool};
use herd_control::revision::{Defaults, ModelCache};
use kube::Client;
use kube::api::ListParams;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::autoscale::{AutoscalerOptions, Logs};
use crate::context::Context;
use crate::http::Pages;
use crate::lease::{Leadership, LeaseOptions};
use crate::metrics::Metrics;

/// Between looks for the API server and the custom resources.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// For passes that run to end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Makes a fleet of each `LlamaDeployment`
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Image of workers, unless a LlamaDeployment names another
    #[arg(long, env = "HERD_WORKER_IMAGE")]
    worker_image: String,
    /// Folder of the nodes where pods keep models that they download; each pod has its own unless given
    #[arg(long, env = "HERD_MODEL_CACHE_PATH")]
    model_cache_path: Option<String>,
    /// What all models in it, or those of a pod, may have: a number with Mi, Gi or Ti
    #[arg(long, env = "HERD_MODEL_CACHE_SIZE", default_value = "500Gi", value_parser = cache_size)]
    model_cache_size: String,
    /// Only LlamaDeployments of this namespace; all unless given
    #[arg(long, env = "HERD_WATCH_NAMESPACE")]
    namespace: Option<String>,
    /// Where /healthz, /readyz, /metrics and /autoscaler/log are served
    #[arg(long, env = "HERD_HTTP", default_value = "0.0.0.0:8080")]
    http: SocketAddr,
    /// Wait for a lease before working, so that one of several operators works
    #[arg(long, env = "HERD_LEADER_ELECTION", default_value_t = true, action = clap::ArgAction::Set)]
    leader_election: bool,
    /// Namespace of the lease
    #[arg(long, env = "POD_NAMESPACE")]
    lease_namespace: Option<String>,
    /// Schedule gangs of several pods by `PodGroup`s, where the cluster has them
    #[arg(long, env = "HERD_POD_GROUPS", default_value_t = true, action = clap::ArgAction::Set)]
    pod_groups: bool,
    /// Name of the lease
    #[arg(long, env = "HERD_LEASE_NAME", default_value = "herd-operator")]
    lease_name: String,
    /// Who holds the lease; generated unless given
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    #[command(flatten)]
    autoscaler: AutoscalerOptions,
    /// How log lines look; `RUST_LOG` says which
    #[arg(long, env = "HERD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => subscriber.with_ansi(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

// One thread: the operator waits for the API server nearly all of the time, and each thread costs memory.
#[tokio::main(flavor = "current_thread")]
async fn run(args: Args) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    tokio::select! {
        ended = work(args, stop.clone()) => ended,
        () = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping");
            stop.cancel();
            tokio::time::sleep(STOP_DEADLINE).await;
        } => bail!("did not stop within {STOP_DEADLINE:?}"),
    }
}

async fn work(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let Args {
        worker_image,
        model_cache_path,
        model_cache_size,
        namespace,
        http,
        pod_groups,
        leader_election,
        lease_namespace,
        lease_name,
        identity,
        autoscaler,
        log_format: _,
    } = args;
    let namespace = namespace.filter(|namespace| !namespace.is_empty());
    let identity = identity.unwrap_or_else(|| format!("herd-operator-{}", uuid::Uuid::new_v4()));
    let metrics = Arc::new(Metrics::new().context("metrics")?);
    let ready = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind(http).await.with_context(|| format!("listen on {http}"))?;
    let logs = Logs::default();
    let pages = Pages { ready: Arc::clone(&ready), metrics: Arc::clone(&metrics), logs: logs.clone() };
    let serving = CancellationToken::new();
    let _pages = serving.clone().drop_guard();
    tokio::spawn(http::serve(listener, pages, serving));
    let client = Client::try_default().await.context("find the API server")?;
    tokio::select! {
        () = resources_are_there(&client, namespace.as_deref()) => ready.store(true, Ordering::Relaxed),
        () = stop.cancelled() => return Ok(()),
    }
    let path = model_cache_path.filter(|path| !path.is_empty());
    let defaults = Defaults { worker_image, model_cache: ModelCache { path, size: model_cache_size } };
    let pod_groups = pod_groups && has_pod_groups(&client).await;
    let reporter = identity.clone();
    let context =
        Arc::new(Context::new(client.clone(), defaults, pod_groups, Arc::clone(&metrics), reporter));
    let namespace = namespace.as_deref();
    if leader_election {
        let lease_namespace = lease_namespace.context("--lease-namespace is needed to elect a leader")?;
        let options = LeaseOptions { namespace: lease_namespace, name: lease_name, identity };
        let mut leadership = tokio::select! {
            leadership = Leadership::acquire(client, options) => leadership,
            () = stop.cancelled() => return Ok(()),
        };
        metrics.leader(true);
        tokio::select! {
            () = controllers::run(context, namespace, &autoscaler, logs, stop) => {}
            () = leadership.lost() => bail!("the lease is lost: another operator may work now"),
        }
        leadership.release().await;
    } else {
        metrics.leader(true);
        controllers::run(context, namespace, &autoscaler, logs, stop).await;
    }
    Ok(())
}

/// As the worker reads it, and Kubernetes too.
fn cache_size(text: &str) -> Result<String, String> {
    let number = ["Mi", "Gi", "Ti"].iter().find_map(|unit| text.strip_suffix(unit));
    match number.filter(|number| number.parse::<u32>().is_ok_and(|number| number > 0)) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("{text:?} is not a whole number with Mi, Gi or Ti")),
    }
}

/// Waits until the API server answers and knows the custom resources.
async fn resources_are_there(client: &Client, namespace: Option<&str>) {
    loop {
        let deployments = list::<LlamaDeployment>(client, namespace).await;
        let found = match deployments {
            Ok(()) => list::<LlamaPool>(client, namespace).await,
            Err(error) => Err(error),
        };
        match found {
            Ok(()) => return,
            Err(error) => tracing::warn!("the custom resources cannot be listed yet: {error}"),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Whether the cluster schedules groups of pods: a beta API of Kubernetes 1.37, off by default.
async fn has_pod_groups(client: &Client) -> bool {
    let (version, name) = ("scheduling.k8s.io/v1beta1", "podgroups");
    let found = match client.list_api_group_resources(version).await {
        Ok(served) => served.resources.iter().any(|resource| resource.name == name),
        Err(kube::Error::Api(status)) if status.is_not_found() => false,
        Err(error) => {
            tracing::warn!("failed to ask for the resources of {version}: {error}");
            false
        }
    };
    tracing::info!(found, "PodGroups");
    found
}

async fn list<K>(client: &Client, namespace: Option<&str>) -> Result<(), kube::Error>
where
    K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    controllers::api::<K>(client, namespace).list_metadata(&ListParams::default().limit(1)).await.map(|_| ())
}
