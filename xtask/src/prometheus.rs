//! The Prometheus of a local cluster, which finds pods by their annotations.

use std::path::PathBuf;

use anyhow::Result;

use crate::content;
use crate::herd_cluster::HerdCluster;
use crate::images::Image;
use crate::kubectl::Kubectl;
use crate::paths::Paths;
use crate::progress;

/// What is installed, with places for the image and for what its configuration is.
const MANIFEST: &str = include_str!("../files/prometheus.yaml");

const NAMESPACE: &str = "monitoring";

/// Tells the test of the operator's queries where the program is.
pub(crate) const PROGRAM: &str = "HERD_PROMETHEUS_PROGRAM";

/// Its program, where it is built already: that takes minutes. `build` builds the program that knows, which takes seconds.
pub(crate) fn program(paths: &Paths, build: bool) -> Result<Option<PathBuf>> {
    let cluster = if build { Some(HerdCluster::build(paths)?) } else { HerdCluster::built(paths)? };
    cluster.map_or(Ok(None), |cluster| cluster.built_tool("prometheus"))
}

/// Installs it, and waits until it answers.
pub(crate) fn install(kubectl: &Kubectl, image: &Image) -> Result<()> {
    progress::step("prometheus", |_| {
        let applied = kubectl.text_of(&["apply", "-f", "-"], &manifest(&image.reference))?;
        kubectl.text(&["-n", NAMESPACE, "rollout", "status", "deployment/prometheus", "--timeout=90s"])?;
        let changed = applied.lines().any(|line| !line.ends_with(" unchanged"));
        Ok(((), if changed { "installed" } else { "cached" }.to_owned()))
    })
}

fn manifest(image: &str) -> String {
    let mut config = content::sha256_of(&[MANIFEST]);
    config.truncate(12);
    MANIFEST
        .replace("image: IMAGE", &format!("image: {image}"))
        .replace("config: CONFIG", &format!("config: {config:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_has_no_open_places() {
        let manifest = manifest("lk.local/prometheus:1");
        assert!(manifest.contains("image: lk.local/prometheus:1\n"));
        for line in manifest.lines() {
            assert!(!line.contains("IMAGE") && !line.contains("CONFIG"), "{line}");
        }
    }
}
