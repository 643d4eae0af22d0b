//! The Go program of `e2e/cluster`, built once for each content of its sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::content;
use crate::go::Go;
use crate::paths::Paths;
use crate::progress;

/// Programs of other contents of the sources that are kept, for clones beside this one.
const KEPT: usize = 3;

/// Held by the thread that builds: checks run side by side.
static BUILDING: Mutex<()> = Mutex::new(());

/// The program, built.
#[derive(Debug, Clone)]
pub(crate) struct HerdCluster {
    program: PathBuf,
    sources: PathBuf,
    go: Go,
}

impl HerdCluster {
    /// Builds the program where its folder, named after all that decides its content, is not there.
    pub(crate) fn build(paths: &Paths) -> Result<Self> {
        let began = Instant::now();
        let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
        let go = Go::find(&paths.cache)?;
        let sources = sources(paths);
        let tools = paths.cache.join("tools");
        let dir = tools.join(key(&sources, &go)?);
        let program = dir.join("herd-cluster");
        let how = if program.exists() {
            // Programs are pruned by their age.
            let _ = fs::File::open(&program).and_then(|file| file.set_modified(std::time::SystemTime::now()));
            "cached"
        } else {
            fs::create_dir_all(&dir).with_context(|| format!("failed to make {}", dir.display()))?;
            let fresh = dir.join(format!("herd-cluster.{}", std::process::id()));
            let status = go
                .command(&["build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o"])?
                .arg(&fresh)
                .arg(".")
                .current_dir(&sources)
                .env("CGO_ENABLED", "0")
                .status()
                .context("failed to run go")?;
            ensure!(status.success(), "go build of {} ended with {status}", sources.display());
            fs::rename(&fresh, &program).with_context(|| format!("failed to make {}", program.display()))?;
            prune(&tools);
            "built"
        };
        progress::report(&format!("herd-cluster: {how}"), began.elapsed());
        Ok(Self { program, sources, go })
    }

    /// The program, where it is built already.
    pub(crate) fn built(paths: &Paths) -> Result<Option<Self>> {
        let Some(go) = Go::there(&paths.cache)? else { return Ok(None) };
        let sources = sources(paths);
        let program = paths.cache.join("tools").join(key(&sources, &go)?).join("herd-cluster");
        Ok(program.is_file().then_some(Self { program, sources, go }))
    }

    /// The program with its arguments.
    pub(crate) fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("PATH", self.go.path()?);
        Ok(command)
    }

    /// A command that needs the sources of the tools.
    pub(crate) fn command_with_tools(&self, arguments: &[&str]) -> Result<Command> {
        let (command, rest) = arguments.split_at(1.min(arguments.len()));
        let mut program = self.command(command)?;
        program.arg("--sources").arg(self.sources.join("tools")).args(rest);
        Ok(program)
    }

    /// Builds a tool where it is not cached; its program of the same name.
    pub(crate) fn tool(&self, name: &str) -> Result<PathBuf> {
        let dir = output(self.command_with_tools(&["build", name])?)?;
        Ok(Path::new(dir.trim()).join(name))
    }

    /// A tool's program of the same name, where it is built already.
    pub(crate) fn built_tool(&self, name: &str) -> Result<Option<PathBuf>> {
        let dir = output(self.command_with_tools(&["build", "--cached", name])?)?;
        let dir = dir.trim();
        Ok((!dir.is_empty()).then(|| Path::new(dir).join(name)))
    }

    /// `go test` of the program's own tests.
    pub(crate) fn tests(&self) -> Result<Command> {
        let mut command = self.go.command(&["test", "-count=1", "-timeout=15m", "-v", "./..."])?;
        command.current_dir(&self.sources);
        Ok(command)
    }
}

/// What a command prints on its standard output; its errors are seen.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default().display().to_string();
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("failed to run {name}"))?;
    ensure!(output.status.success(), "{name} ended with {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn sources(paths: &Paths) -> PathBuf {
    paths.root.join("e2e/cluster")
}

fn key(sources: &Path, go: &Go) -> Result<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(sources).with_context(|| format!("failed to list {}", sources.display()))? {
        files.push(entry?.path());
    }
    files.retain(|path| path.is_file());
    content::list_files(&sources.join("internal"), &mut files)?;
    files.sort();
    let mut sum = Sha256::new_with_prefix(&go.version);
    for file in files {
        let content = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        sum.update(format!("{} {}\n", file.strip_prefix(sources)?.display(), content.len()));
        sum.update(content);
    }
    let mut key = format!("{:x}", sum.finalize());
    key.truncate(20);
    Ok(key)
}

/// Removes old programs but those of running clusters, which start their nodes with them.
fn prune(tools: &Path) {
    let Ok(entries) = fs::read_dir(tools) else { return };
    let mut programs: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path().join("herd-cluster"))).collect();
    let running = running();
    programs.retain(|program| program.is_file() && !running.contains(program));
    content::prune(programs, KEPT);
}

/// Programs of all processes that can be seen.
fn running() -> Vec<PathBuf> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes.filter_map(|process| fs::read_link(process.ok()?.path().join("exe")).ok()).collect()
}
