//! The `kubectl` of a local cluster.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Runs the script in a cluster's folder.
#[derive(Debug, Clone)]
pub(crate) struct Kubectl(PathBuf);

impl Kubectl {
    /// Of the cluster in this folder.
    pub(crate) fn of(cluster: &Path) -> Self {
        Self(cluster.join("kubectl"))
    }

    /// The script.
    pub(crate) fn script(&self) -> &Path {
        &self.0
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.0);
        command.args(arguments);
        command
    }

    /// What a command prints; a failed one's errors are in the error.
    pub(crate) fn text(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output().context("failed to run kubectl")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {} failed: {}", arguments.join(" "), errors.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What a command prints as JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.text(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("kubectl {} printed no JSON", arguments.join(" ")))
    }
}
