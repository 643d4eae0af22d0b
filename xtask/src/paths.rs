//! Where things are: the clone, and the cache outside of it that a fresh clone finds filled.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// Folders that commands read and write.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    /// The root of the clone.
    pub(crate) root: PathBuf,
    /// `${XDG_CACHE_HOME:-~/.cache}/herd`.
    pub(crate) cache: PathBuf,
    /// `$CARGO_TARGET_DIR`, or `target` in the cache.
    pub(crate) target: PathBuf,
    /// `$HERD_MODELS`, or `models` in the cache.
    pub(crate) models: PathBuf,
}

impl Paths {
    pub(crate) fn find() -> Result<Self> {
        let root =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?.to_owned();
        let set = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
        let cache = match set("XDG_CACHE_HOME") {
            Some(cache) => cache,
            None => set("HOME")
                .context("neither XDG_CACHE_HOME nor HOME is set: where shall the cache be?")?
                .join(".cache"),
        };
        let cache = cache.join("herd");
        let from_here = |path: PathBuf| std::path::absolute(path).context("the current folder is gone");
        Ok(Self {
            target: from_here(set("CARGO_TARGET_DIR").unwrap_or_else(|| cache.join("target")))?,
            models: from_here(set("HERD_MODELS").unwrap_or_else(|| cache.join("models")))?,
            root,
            cache,
        })
    }

    /// `cargo` in the workspace, building into the target folder outside the clone.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(arguments).current_dir(&self.root);
        // What `cargo run` says about xtask; build scripts that read it would be run again when it changes.
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|own| name.starts_with(own)) {
                command.env_remove(&*name);
            }
        }
        command.env("CARGO_TARGET_DIR", &self.target).env("HERD_MODELS", &self.models);
        // The output is read, not seen: rustfmt colours it unless the terminal is a dumb one.
        command.env("CARGO_TERM_COLOR", "never").env("TERM", "dumb");
        command
    }
}
