//! A namespace of a test's own.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::Kubectl;
use crate::command::run;

/// Gangs of an earlier run end what they do.
const GONE_WITHIN: Duration = Duration::from_mins(2);

/// A namespace under a pod security standard, `restricted` unless told otherwise; deleted, with all that is in it, when dropped.
#[derive(Debug)]
pub struct Namespace {
    kubectl: Kubectl,
    kept: bool,
}

impl Namespace {
    /// Made anew where one is left of an earlier run.
    pub fn create(kubectl: &Kubectl, name: &str) -> Result<Self> {
        Self::under(kubectl, name, "restricted")
    }

    /// The same under another standard: pods of some tests have volumes of their node's folders.
    pub fn under(kubectl: &Kubectl, name: &str, standard: &str) -> Result<Self> {
        let within = kubectl.within(name);
        let timeout = format!("--timeout={}s", GONE_WITHIN.as_secs());
        let delete = ["delete", "namespace", name, "--ignore-not-found", &timeout];
        let patience = GONE_WITHIN + Duration::from_secs(10);
        run(within.command().args(delete), "", patience)
            .and_then(crate::Finished::checked)
            .with_context(|| format!("namespace {name} of an earlier run does not go"))?;
        let labels = json!({
            "app.kubernetes.io/part-of": "herd-e2e",
            "pod-security.kubernetes.io/enforce": standard,
        });
        within.apply(&json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": labels},
        }))?;
        Ok(Self { kubectl: within, kept: false })
    }

    /// In it.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Leaves it be: it goes with the cluster, or when it is made anew.
    pub fn keep(mut self) -> Kubectl {
        self.kept = true;
        self.kubectl.clone()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let name = self.kubectl.namespace();
        if let Err(error) = self.kubectl.run(&["delete", "namespace", name, "--wait=false"]) {
            eprintln!("cannot delete namespace {name}: {error:#}");
        }
    }
}
