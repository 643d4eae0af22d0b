//! The gateway process.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use clap::builder::BoolishValueParser;
use clap::{Parser, ValueEnum};
use herd_gateway::{
    Discovery, FixedFleet, GangEndpoint, Gateway, GatewayOptions, KubernetesFleet, Limits, ReservedPort,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Serves gRPC and OpenAI HTTP in front of gangs.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(flatten)]
    fleet: FleetArguments,
    /// Where OpenAI HTTP, /health, /healthz, /readyz and /metrics are served
    #[arg(long, env = "HERD_HTTP", default_value = "0.0.0.0:8080")]
    http: SocketAddr,
    /// Where gRPC is served
    #[arg(long, env = "HERD_GRPC", default_value = "0.0.0.0:8081")]
    grpc: SocketAddr,
    /// Requests in work at once
    #[arg(long, env = "HERD_CONCURRENT_REQUESTS", default_value_t = Limits::default().concurrent_requests)]
    concurrent_requests: usize,
    /// Seconds a request may take
    #[arg(long, env = "HERD_REQUEST_DEADLINE", default_value_t = Limits::default().request_deadline.as_secs())]
    request_deadline: u64,
    /// Seconds a request waits for a gang where its model has none that is ready; 0: it is refused at once
    #[arg(long, env = "HERD_GANG_WAIT", default_value_t = 10)]
    gang_wait: u64,
    /// How log lines look; `RUST_LOG` says which
    #[arg(long, env = "HERD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// Where the gangs are found: one of the two ways.
#[derive(Debug, clap::Args)]
struct FleetArguments {
    /// Find gangs through the `EndpointSlice`s of a Kubernetes cluster
    #[arg(long, env = "HERD_KUBERNETES", value_parser = BoolishValueParser::new())]
    kubernetes: bool,
    /// The only namespace to look in; all unless given
    #[arg(long, env = "HERD_WATCH_NAMESPACE", default_value = "")]
    namespace: String,
    /// A gang's leader and the name its model is served under; give it once a gang
    #[arg(long = "gang", env = "HERD_GANGS", value_name = "NAME=HOST:PORT", value_delimiter = ',', value_parser = gang)]
    gangs: Vec<GangEndpoint>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl FleetArguments {
    async fn discovery(self) -> anyhow::Result<Arc<dyn Discovery>> {
        let Self { kubernetes, namespace, gangs } = self;
        match (kubernetes, gangs.is_empty()) {
            (true, true) => {
                let namespace = Some(namespace.as_str()).filter(|namespace| !namespace.is_empty());
                Ok(Arc::new(KubernetesFleet::connect(namespace).await?))
            }
            (false, false) => Ok(Arc::new(FixedFleet::new(gangs))),
            (true, false) => bail!("--kubernetes and --gang exclude each other: give one of them"),
            (false, true) => bail!("no fleet is given: give --kubernetes, or --gang once a gang"),
        }
    }
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
    let arguments = Arguments::parse();
    start_logging(arguments.log_format);
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { fleet, http, grpc, concurrent_requests, request_deadline, gang_wait, log_format: _ } =
        arguments;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (http, grpc) = (ReservedPort::reserve(http)?, ReservedPort::reserve(grpc)?);
    let mut options = GatewayOptions::new(fleet.discovery().await?, http, grpc);
    options.limits.concurrent_requests = concurrent_requests;
    options.limits.request_deadline = Duration::from_secs(request_deadline);
    options.limits.gang_wait = Duration::from_secs(gang_wait);
    let gateway = Gateway::start(options).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    gateway.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }

    #[tokio::test]
    async fn a_fleet_is_found_in_one_of_two_ways() {
        let discovery = async |arguments: &[&str]| {
            let arguments = ["herd-gateway"].iter().chain(arguments);
            Arguments::try_parse_from(arguments).unwrap().fleet.discovery().await.map(|found| found.watch())
        };
        let fixed = discovery(&["--gang", "a=h:1,b=h:2", "--gang", "c=h:3"]).await.unwrap();
        assert_eq!(fixed.borrow().as_ref().unwrap().models.len(), 3);
        assert!(discovery(&[]).await.unwrap_err().to_string().contains("no fleet is given"));
        let both = discovery(&["--kubernetes", "--gang", "a=h:1"]).await;
        assert!(both.unwrap_err().to_string().contains("exclude each other"));
    }
}
