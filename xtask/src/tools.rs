//! Tools that take minutes to compile, kept in the cache folder, one folder a version.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths::Paths;
use crate::step::{Outcome, run};

const CARGO_DENY: &str = "0.20.2";

fn cargo_deny(paths: &Paths) -> PathBuf {
    paths.cache.join(format!("tools/cargo-deny-{CARGO_DENY}/bin/cargo-deny"))
}

/// Checks licences, banned crates and sources of all dependencies against `deny.toml`.
pub(crate) fn deny(paths: &Paths) -> Outcome {
    let tool = cargo_deny(paths);
    if !tool.is_file() {
        return Outcome::skip(format!(
            "cargo-deny {CARGO_DENY} would take minutes to build; run cargo xtask tools"
        ));
    }
    let mut command = Command::new(tool);
    command.args(["check", "bans", "licenses", "sources"]).current_dir(&paths.root);
    let (success, output) = run(command);
    Outcome::one(success, String::new(), output)
}

/// Builds what is not there yet.
pub(crate) fn install(paths: &Paths) -> Result<()> {
    let tool = cargo_deny(paths);
    if tool.is_file() {
        println!("cargo-deny {CARGO_DENY}: cached");
        return Ok(());
    }
    println!("cargo-deny {CARGO_DENY}: building, which takes minutes");
    let folder = paths.cache.join(format!("tools/cargo-deny-{CARGO_DENY}"));
    let status = paths
        .cargo(&["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--root"])
        .arg(&folder)
        .status()
        .context("cannot run cargo install")?;
    if !status.success() || !tool.is_file() {
        bail!("cargo install cargo-deny {CARGO_DENY}: {status}");
    }
    println!("cargo-deny {CARGO_DENY}: installed");
    Ok(())
}
