//! The gateway process.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use herd_gateway::{FixedFleet, GangEndpoint, Gateway, GatewayOptions, ReservedPort};
use tokio::signal::unix::{SignalKind, signal};

/// Serves gRPC and OpenAI HTTP in front of gangs.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// A gang's leader and the name its model is served under; give it once a gang
    #[arg(long = "gang", value_name = "NAME=HOST:PORT", required = true, value_parser = gang)]
    gangs: Vec<GangEndpoint>,
    /// Where OpenAI HTTP, /health and /metrics are served
    #[arg(long, default_value = "0.0.0.0:8080")]
    http: SocketAddr,
    /// Where gRPC is served
    #[arg(long, default_value = "0.0.0.0:8081")]
    grpc: SocketAddr,
    /// Requests in work at once
    #[arg(long, default_value_t = 1024)]
    concurrent_requests: usize,
    /// Seconds a request may take
    #[arg(long, default_value_t = 900)]
    request_deadline: u64,
}

fn gang(text: &str) -> Result<GangEndpoint, String> {
    match text.split_once('=') {
        Some((name, leader)) if !name.is_empty() && leader.contains(':') => {
            Ok(GangEndpoint { models: vec![name.to_owned()], leader: leader.to_owned() })
        }
        _ => Err(format!("{text:?} is not NAME=HOST:PORT")),
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { gangs, http, grpc, concurrent_requests, request_deadline } = arguments;
    let (http, grpc) = (ReservedPort::reserve(http)?, ReservedPort::reserve(grpc)?);
    let mut options = GatewayOptions::new(Arc::new(FixedFleet::new(gangs)), http, grpc);
    options.limits.concurrent_requests = concurrent_requests;
    options.limits.request_deadline = Duration::from_secs(request_deadline);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let gateway = Gateway::start(options).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    gateway.shutdown().await;
    Ok(())
}
