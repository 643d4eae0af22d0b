//! `cargo xtask crds`: writes `crds/` from the types of `crates/api`.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::binaries;
use crate::paths::Paths;
use crate::step::run;

/// Writes every custom resource definition.
pub(crate) fn write(paths: &Paths) -> Result<()> {
    let mut crds = Command::new(binaries::crds(paths)?);
    crds.arg(paths.root.join("crds"));
    let (success, output) = run(crds);
    ensure!(success, "{}", output.trim_end());
    Ok(())
}
