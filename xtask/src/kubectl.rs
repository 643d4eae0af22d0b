//! `kubectl`, for one cluster.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Runs the script in a local cluster's folder, or the machine's own with a context.
#[derive(Debug, Clone)]
pub(crate) struct Kubectl {
    program: PathBuf,
    context: Option<String>,
}

impl Kubectl {
    /// Of the local cluster in this folder.
    pub(crate) fn of(cluster: &Path) -> Self {
        Self { program: cluster.join("kubectl"), context: None }
    }

    /// Of a context of the kubeconfig.
    pub(crate) fn of_context(context: &str) -> Self {
        Self { program: PathBuf::from("kubectl"), context: Some(context.to_owned()) }
    }

    /// What is run.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(context) = &self.context {
            command.args(["--context", context]);
        }
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
    /// What a command prints that reads an object.
    pub(crate) fn text_of(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("failed to run kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl has no input")?;
        // Why it did not read its input is in its errors.
        let written = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context("failed to run kubectl")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {} failed: {}", arguments.join(" "), errors.trim());
        written.context("failed to write to kubectl")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
