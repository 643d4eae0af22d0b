//! `herd status`, also as `kubectl herd status`: pools, gangs, their load and what was decided last, on one screen.

mod cluster;
mod overview;
mod text;

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use herd_gateway::FleetReport;

use self::cluster::{Cluster, Where};
use self::overview::Overview;
use crate::bench::Target;

/// Between two looks.
const AGAIN: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    /// Only this LlamaDeployment
    name: Option<String>,
    /// Namespace to look in; the kubeconfig's unless given
    #[arg(long, short, conflicts_with_all = ["all_namespaces", "url"])]
    namespace: Option<String>,
    /// Look in all namespaces
    #[arg(long, short = 'A', conflicts_with = "url")]
    all_namespaces: bool,
    /// Look again every two seconds
    #[arg(long, short)]
    watch: bool,
    /// How it is printed
    #[arg(long, short, default_value = "text")]
    output: Output,
    /// A gateway to ask, and no cluster: http://HOST:PORT
    #[arg(long)]
    url: Option<String>,
    /// Namespace of the gateway
    #[arg(long, default_value = "herd-system")]
    gateway_namespace: String,
    /// The gateway's Service
    #[arg(long, default_value = "herd-gateway")]
    gateway_service: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Once, or until it is stopped.
pub(crate) fn run(arguments: StatusArguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(show(arguments))
}

async fn show(arguments: StatusArguments) -> anyhow::Result<()> {
    let StatusArguments {
        name,
        namespace,
        all_namespaces,
        watch,
        output,
        url,
        gateway_namespace,
        gateway_service,
    } = arguments;
    let place = match (namespace, all_namespaces) {
        (_, true) => Where::Everywhere,
        (Some(namespace), false) => Where::Namespace(namespace),
        (None, false) => Where::Current,
    };
    let source = match url {
        Some(url) => Source::Gateway(Target::new(&url)?),
        None => Source::Cluster(Cluster::connect(place, gateway_namespace, gateway_service).await?),
    };
    loop {
        let overview = source.look(name.as_deref()).await;
        match overview {
            Ok(overview) => print(&overview, output, watch)?,
            // Somebody watches: the next look may go better.
            Err(error) if watch => eprintln!("error: {error:#}"),
            Err(error) => return Err(error),
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

enum Source {
    Cluster(Cluster),
    Gateway(Target),
}

impl Source {
    async fn look(&self, name: Option<&str>) -> anyhow::Result<Overview> {
        match self {
            Self::Cluster(cluster) => cluster.look(name).await,
            Self::Gateway(target) => {
                let (status, body) = target.get("/fleet.json").await?;
                let report: FleetReport = serde_json::from_slice(&body)
                    .with_context(|| format!("/fleet.json: status {status}, and no report"))?;
                Ok(Overview::of_gateway(report, name))
            }
        }
    }
}

fn print(overview: &Overview, output: Output, watch: bool) -> anyhow::Result<()> {
    let text = match output {
        Output::Text => overview.to_string(),
        // A line a look, so that a program can read them as they come.
        Output::Json if watch => serde_json::to_string(overview)? + "\n",
        Output::Json => serde_json::to_string_pretty(overview)? + "\n",
    };
    let mut out = std::io::stdout().lock();
    if watch && output == Output::Text && out.is_terminal() {
        // Home, and nothing below.
        out.write_all(b"\x1b[H\x1b[J")?;
    }
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}
