//! The gateway process.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use herd_gateway::{
    Discovery, FixedFleet, GangEndpoint, Gateway, GatewayOptions, KubernetesFleet, ReservedPort,
};
use tokio::signal::unix::{SignalKind, signal};

/// Serves gRPC and OpenAI HTTP in front of gangs.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// A gang's leader and the name its model is served under; give it once a gang
    #[arg(long = "gang", value_name = "NAME=HOST:PORT", required_unless_present = "kubernetes", value_parser = gang)]
    gangs: Vec<GangEndpoint>,
    /// Find the gangs of the LlamaDeployments of this cluster instead
    #[arg(long, env = "HERD_KUBERNETES", conflicts_with = "gangs")]
    kubernetes: bool,
    /// Only those of this namespace; of all unless given
    #[arg(long, env = "HERD_WATCH_NAMESPACE")]
    namespace: Option<String>,
    /// Seconds a request waits for a gang where its model has none that is ready
    #[arg(long, env = "HERD_GANG_WAIT", default_value_t = 10)]
    gang_wait: u64,
    /// Where OpenAI HTTP, /health and /metrics are served
    #[arg(long, env = "HERD_HTTP", default_value = "0.0.0.0:8080")]
    http: SocketAddr,
    /// Where gRPC is served
    #[arg(long, env = "HERD_GRPC", default_value = "0.0.0.0:8081")]
    grpc: SocketAddr,
    /// Requests in work at once
    #[arg(long, env = "HERD_CONCURRENT_REQUESTS", default_value_t = 1024)]
    concurrent_requests: usize,
    /// Seconds a request may take
    #[arg(long, env = "HERD_REQUEST_DEADLINE", default_value_t = 900)]
    request_deadline: u64,
    /// How log lines look; `RUST_LOG` says which
    #[arg(long, env = "HERD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

fn gang(text: &str) -> Result<GangEndpoint, String> {
    match text.split_once('=') {
        Some((name, leader)) if !name.is_empty() && leader.contains(':') => {
            Ok(GangEndpoint { models: vec![name.to_owned()], leader: leader.to_owned() })
        }
        _ => Err(format!("{text:?} is not NAME=HOST:PORT")),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        gangs,
        kubernetes,
        namespace,
        gang_wait,
        http,
        grpc,
        concurrent_requests,
        request_deadline,
        log_format: _,
    } = arguments;
    let (http, grpc) = (ReservedPort::reserve(http)?, ReservedPort::reserve(grpc)?);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let discovery: Arc<dyn Discovery> = if kubernetes {
        let namespace = namespace.filter(|namespace| !namespace.is_empty());
        Arc::new(KubernetesFleet::connect(namespace.as_deref()).await?)
    } else {
        Arc::new(FixedFleet::new(gangs))
    };
    let mut options = GatewayOptions::new(discovery, http, grpc);
    options.limits.gang_wait = Duration::from_secs(gang_wait);
    options.limits.concurrent_requests = concurrent_requests;
    options.limits.request_deadline = Duration::from_secs(request_deadline);
    let gateway = Gateway::start(options).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    gateway.shutdown().await;
    Ok(())
}
