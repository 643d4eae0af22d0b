//! Where `cargo xtask e2e` has put what the tests need.

use std::env;
use std::path::PathBuf;

/// Programs and folders, from environment variables.
#[derive(Clone, Debug)]
pub struct Environment {
    /// `kubectl` for the cluster.
    pub kubectl: PathBuf,
    /// The command `herd`.
    pub herd: PathBuf,
    /// `grpcurl`.
    pub grpcurl: PathBuf,
    /// `helm`.
    pub helm: PathBuf,
    /// A Python that has the package `openai`.
    pub python: PathBuf,
    /// The folder of SmolLM2's checkpoints.
    pub models: PathBuf,
}

impl Environment {
    /// From the environment; else why the tests cannot run.
    pub fn find() -> Result<Self, String> {
        Self::from(|name| env::var(name).ok())
    }

    fn from(value: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let path = |name: &str| {
            let set = value(name).filter(|value| !value.is_empty());
            set.map(PathBuf::from).ok_or_else(|| format!("{name} is not set: cargo xtask e2e sets it"))
        };
        Ok(Self {
            kubectl: path("HERD_E2E_KUBECTL")?,
            herd: path("HERD_E2E_HERD")?,
            grpcurl: path("HERD_E2E_GRPCURL")?,
            helm: path("HERD_E2E_HELM")?,
            python: path("HERD_E2E_PYTHON")?,
            models: path("HERD_MODELS")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let all = Environment::from(|name| Some(format!("/{name}"))).unwrap();
        assert_eq!(all.models, PathBuf::from("/HERD_MODELS"));
        let without = |missing: &'static str| {
            Environment::from(|name| Some(if name == missing { "" } else { "/x" }.to_owned())).unwrap_err()
        };
        assert_eq!(without("HERD_E2E_HERD"), "HERD_E2E_HERD is not set: cargo xtask e2e sets it");
    }
}
