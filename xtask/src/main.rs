//! Every developer command: `cargo xtask --help`.

mod ask;
mod bench;
mod binaries;
mod cargo_test;
mod cluster;
mod content;
mod crds;
mod diagnostics;
mod e2e;
mod go;
mod go_test;
mod herd_cluster;
mod images;
mod install;
mod kubectl;
mod llama_cpp;
mod lock;
mod machine;
mod metrics_doc;
mod models;
mod oci;
mod own;
mod own_test;
mod paths;
mod progress;
mod prometheus;
mod ready;
mod release;
mod step;
mod stream;
mod target;
mod test;
mod tools;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of Herd
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// From a clone to an answer: a Kubernetes on this machine, Herd in it, and a model that is asked a question
    Up {
        /// Name of the cluster
        #[arg(long, default_value = up::DEFAULT)]
        name: String,
        /// Use the cluster of this context of the kubeconfig instead: no root, but kubectl, helm and a registry
        #[arg(long, conflicts_with = "name", requires = "registry")]
        context: Option<String>,
        /// With --context: where images are pushed to, and nodes pull them from: HOST/PATH or HOST:PORT/PATH
        #[arg(long, requires = "context")]
        registry: Option<String>,
        /// The registry has no TLS
        #[arg(long, requires = "registry")]
        insecure_registry: bool,
    },
    /// Remove what `up` made
    Down {
        /// Name of the cluster
        #[arg(long, default_value = up::DEFAULT)]
        name: String,
        /// Remove Herd from the cluster of this context of the kubeconfig instead; what was pushed stays
        #[arg(long, conflicts_with = "name")]
        context: Option<String>,
    },
    /// Check everything; the last line says how many checks passed and failed
    Test {
        /// Only what needs no downloaded model: format, lints, licences, tests, documentation
        #[arg(long)]
        fast: bool,
    },
    /// Run the end-to-end tests on a cluster of their own
    E2e {
        /// Leave the cluster up, and use the one that an earlier run left
        #[arg(long)]
        keep: bool,
        /// Only the test of `up --context`
        #[arg(long, conflicts_with_all = ["keep", "filter"])]
        own: bool,
        /// Name of the cluster; without it, one that no other clone has
        #[arg(long)]
        name: Option<String>,
        /// Only tests with this in their name
        filter: Option<String>,
    },
    /// Measure, beside a peer in the same run
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Check format, lints, licences and documentation
    Lint,
    /// Format the code
    Fmt,
    /// Fetch SmolLM2-135M and make bf16 and FP8 checkpoints of it, where they are not there already
    Models,
    /// Write the custom resource definitions of `crates/api` into `crds/`
    Crds,
    /// Write `docs/metrics.md` from the declarations in `crates/metrics`
    MetricsDoc,
    /// Make the container images of Herd and of the models, where they are not there already
    Images,
    /// A real Kubernetes on this machine
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Build the tools that the checks use into the cache folder, where they are not there already
    Tools,
}

fn main() -> anyhow::Result<ExitCode> {
    let paths = paths::Paths::find()?;
    let command = Cli::parse().command;
    if matches!(command, Command::E2e { .. } | Command::Test { .. } | Command::Lint) {
        target::take(&paths)?;
    }
    match command {
        Command::Up { name, context, registry, insecure_registry } => {
            match context.zip(registry) {
                Some((context, registry)) => {
                    let registry = oci::Registry::parse(&registry, insecure_registry)?;
                    own::up(&paths, &context, &registry)?;
                }
                None => up::up(&paths, &name)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Down { name, context } => {
            match context {
                Some(context) => own::down(&context)?,
                None => up::down(&paths, &name)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::E2e { own: true, name, .. } => Ok(own_test::run_alone(&paths, name)),
        Command::E2e { keep, own: false, name, filter } => {
            Ok(e2e::run_alone(&paths, e2e::Options { keep, filter, name }))
        }
        Command::Bench(bench) => bench::run(&paths, bench),
        Command::Test { fast } => Ok(test::run(&paths, fast)),
        Command::Lint => Ok(test::lint(&paths)),
        Command::Fmt => test::fmt(&paths),
        Command::Models => {
            for line in models::make(&paths)? {
                println!("{line}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Crds => {
            crds::write(&paths)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::MetricsDoc => {
            metrics_doc::write(&paths)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Images => {
            let images = images::make(&paths, &[models::BF16, models::FP8])?;
            for image in images.all() {
                println!("{:<48} {}", image.reference, image.layout.display());
            }
            print!("\nvalues of charts/herd:\n{}", images.values());
            Ok(ExitCode::SUCCESS)
        }
        Command::Cluster(command) => {
            cluster::run(&paths, command)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Tools => {
            tools::install(&paths)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
