//! The end-to-end tests, on a cluster of their own.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::install::{self, Down, Installed};
use crate::kubectl::Kubectl;
use crate::lock::Lock;
use crate::paths::Paths;
use crate::progress::{self, Activity};
use crate::step::{Outcome, Step, run, run_lanes, run_watched};
use crate::{binaries, cargo_test, cluster, content, diagnostics, machine, models};

/// What the cluster's name begins with, unless one is given.
const WORD: &str = "e2e";

/// What the tests' Python program imports.
const REQUIREMENTS: &str = "e2e/requirements.txt";

const TEST: [&str; 6] = ["test", "--release", "--workspace", "--no-fail-fast", "--test", "fleet"];

/// How the tests are run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// Use and leave a cluster that is up.
    pub(crate) keep: bool,
    /// Only tests that have this in their name.
    pub(crate) filter: Option<String>,
    /// Of the cluster; named after the clone without it.
    pub(crate) name: Option<String>,
}

/// `cargo xtask e2e`.
pub(crate) fn run_alone(paths: &Paths, options: Options) -> ExitCode {
    run_lanes(vec![vec![step(paths, options)]])
}

/// The tests as one step.
pub(crate) fn step(paths: &Paths, options: Options) -> Step<'_> {
    Step::new("end to end", move || match machine::obstacle() {
        Some(why) => Outcome::skip(why),
        None => test(paths, options),
    })
}

fn test(paths: &Paths, options: Options) -> Outcome {
    let Options { keep, filter, name } = options;
    let name = name.unwrap_or_else(|| cluster::of_clone(paths, WORD));
    let lock = match Lock::of_cluster(paths, &name, "e2e") {
        Ok(lock) => lock,
        Err(error) => return Outcome::one(false, String::new(), format!("{error:#}\n")),
    };
    let _down = (!keep).then(|| Down { paths, name: &name });
    let mut outcome = match prepare(paths, &name, &lock, keep) {
        Ok(command) => {
            let (success, output) = run_tests(command, filter.as_deref());
            cargo_test::outcome(success, output)
        }
        Err(error) => Outcome::one(false, String::new(), format!("{error:#}\n")),
    };
    let kubectl = Kubectl::of(&install::cluster_folder(paths, &name));
    if outcome.failed > 0 && kubectl.program().is_file() {
        outcome.output += &diagnostics::collect(&kubectl, &[]);
    }
    outcome
}

/// Everything that the tests need, and the command that runs them.
fn prepare(paths: &Paths, name: &str, lock: &Lock, keep: bool) -> Result<Command> {
    if !keep {
        // What an earlier run left, whatever became of it.
        install::remove(paths, name)?;
    }
    progress::step("tests", |activity| Ok(((), compile(paths, activity)?)))?;
    let python = progress::step("python", |activity| python(paths, activity))?;
    let Installed { kubectl, kubeconfig: _, grpcurl, helm } = install::install(paths, name, lock)?;
    let mut command = paths.cargo(&TEST);
    command
        .env("HERD_E2E_CLUSTER", name)
        .env("HERD_E2E_KUBECTL", kubectl.program())
        .env("HERD_E2E_HERD", binaries::path(paths, "herd"))
        .env("HERD_E2E_GRPCURL", grpcurl)
        .env("HERD_E2E_HELM", helm)
        .env("HERD_E2E_PYTHON", python)
        .env("HERD_MODELS", &paths.models);
    Ok(command)
}

/// Compiles before the cluster is up: its probes would fail for want of a processor.
fn compile(paths: &Paths, activity: &Activity) -> Result<String> {
    models::make(paths)?;
    let mut command = paths.cargo(&TEST);
    command.arg("--no-run");
    let (success, output) = run_watched(command, |line| activity.set(line));
    ensure!(success, "{}", output.trim_end());
    Ok(crate::step::compiled(&output))
}

fn run_tests(mut command: Command, filter: Option<&str>) -> (bool, String) {
    command.args(["--", "--test-threads=1", "--show-output"]).args(filter);
    run_watched(command, |line| {
        if let Some(result) = line.strip_prefix("test ").filter(|line| line.contains(" ... ")) {
            eprintln!("  {result}");
        }
    })
}

/// Python of an environment with what the tests import, made once for each content of the requirements.
fn python(paths: &Paths, activity: &Activity) -> Result<(PathBuf, String)> {
    let requirements = paths.root.join(REQUIREMENTS);
    let version = {
        let (success, output) = run(python3(&["--version"]));
        ensure!(success, "{}", output.trim_end());
        output
    };
    let mut key = content::sha256_of(&[&content::sha256(&requirements)?, &version]);
    key.truncate(20);
    let folder = paths.cache.join("tools").join(format!("python-{key}"));
    let python = folder.join("bin/python");
    let done = folder.join(".done");
    if done.is_file() {
        return Ok((python, "cached".to_owned()));
    }
    // Paths of an environment are absolute: it is made where it stays.
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    activity.set("pip install");
    let mut make = python3(&["-m", "venv", "--without-pip"]);
    make.arg(&folder);
    let mut install = python3(&["-m", "pip", "--python"]);
    install.arg(&python).args(["install", "--quiet", "--disable-pip-version-check", "--requirement"]);
    install.arg(&requirements);
    for command in [make, install] {
        let (success, output) = run(command);
        ensure!(success, "{}", output.trim_end());
    }
    fs::write(&done, "").with_context(|| format!("write {}", done.display()))?;
    Ok((python, "made".to_owned()))
}

fn python3(arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(arguments);
    command
}
