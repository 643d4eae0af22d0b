//! `cluster`: a real Kubernetes on this machine, which the Go program in `e2e/cluster` makes.

use anyhow::{Context, Result, ensure};

use crate::content;
use crate::go_test;
use crate::herd_cluster::HerdCluster;
use crate::paths::Paths;
use crate::step::{self, Outcome};

/// What to do with a local cluster.
#[derive(clap::Subcommand)]
pub(crate) enum ClusterCommand {
    /// Starts a cluster; what it runs is built where it is not cached
    Up {
        /// Everything the cluster owns on the machine is named after it
        #[arg(long, default_value = "herd")]
        name: String,
        #[arg(long, default_value_t = 2)]
        nodes: u8,
    },
    /// Removes a cluster and all it owns, whatever became of it
    Down {
        #[arg(long, default_value = "herd")]
        name: String,
    },
    /// Lists clusters with their nodes and processes
    Status {
        /// One cluster only
        #[arg(long)]
        name: Option<String>,
    },
    /// Builds tools where they are not cached and prints their folders
    Build {
        /// kubernetes, containerd, coredns, pause, helm, grpcurl, prometheus, registry
        #[arg(required = true)]
        tools: Vec<String>,
    },
}

/// Hexadecimal digits that tell clones apart: with a word of three letters and a hyphen that makes the 12 characters of the longest
/// name.
const DIGITS: usize = 8;

/// The name of a cluster that tests make: another one in each clone, so that several can be tested side by side.
pub(crate) fn of_clone(paths: &Paths, word: &str) -> String {
    let mut digits = content::sha256_of(&[&paths.root.to_string_lossy()]);
    digits.truncate(DIGITS);
    format!("{word}-{digits}")
}

/// What the tests of the cluster start; building it can take much longer than the tests may.
const TESTED: [&str; 5] = ["build", "pause", "containerd", "coredns", "kubernetes"];

/// Runs one command.
pub(crate) fn run(paths: &Paths, command: ClusterCommand) -> Result<()> {
    let program = HerdCluster::build(paths)?;
    let mut command = match command {
        ClusterCommand::Up { name, nodes } => {
            program.command_with_tools(&["up", "--name", &name, "--nodes", &nodes.to_string()])?
        }
        ClusterCommand::Down { name } => program.command(&["down", "--name", &name])?,
        ClusterCommand::Status { name: Some(name) } => program.command(&["status", "--name", &name])?,
        ClusterCommand::Status { name: None } => program.command(&["status"])?,
        ClusterCommand::Build { tools } => {
            let words: Vec<&str> = std::iter::once("build").chain(tools.iter().map(String::as_str)).collect();
            program.command_with_tools(&words)?
        }
    };
    let status = command.status().context("failed to run herd-cluster")?;
    ensure!(status.success(), "herd-cluster ended with {status}");
    Ok(())
}

/// Runs the tests of the cluster program, and of clusters. They need root, and say so where they are skipped.
pub(crate) fn test(paths: &Paths) -> Outcome {
    let prepared = HerdCluster::build(paths)
        .and_then(|program| Ok((program.command_with_tools(&TESTED)?, program.tests()?)));
    let (build, tests) = match prepared {
        Ok(commands) => commands,
        Err(error) => return Outcome::one(false, String::new(), format!("{error:#}")),
    };
    let (success, output) = step::run(build);
    if success { go_test::outcome(step::run(tests)) } else { Outcome::one(false, String::new(), output) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn clone(root: &str) -> Paths {
        let elsewhere = PathBuf::from("/cache");
        Paths { root: root.into(), cache: elsewhere.clone(), target: elsewhere.clone(), models: elsewhere }
    }

    #[test]
    fn each_clone_has_clusters_of_its_own() {
        let (one, other) = (clone("/clones/one"), clone("/clones/other"));
        assert_ne!(of_clone(&one, "e2e"), of_clone(&other, "e2e"));
        assert_ne!(of_clone(&one, "e2e"), of_clone(&one, "own"));
        assert_eq!(of_clone(&one, "e2e"), of_clone(&one, "e2e"));
        // Longer ones are refused: a network interface is named after a cluster.
        assert_eq!(of_clone(&one, "e2e").len(), 12);
    }
}
