//! Builds the workspace's programs.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::paths::Paths;
use crate::progress::Activity;
use crate::step::{compiled, run_watched};
use crate::target;

/// Cargo compiles a dependency once for the tests and once more for programs alone, where some test switches on more of its
/// features. An example counts as a test there: with one in each build, there is one set of features.
const EXAMPLE: [&str; 2] = ["--example", "crds"];

/// Builds the programs that users run; how much there was to compile.
pub(crate) fn all(paths: &Paths, activity: &Activity) -> Result<String> {
    let programs = ["herd", "herd-gateway", "herd-operator", "herd-worker"];
    build(paths, &programs.map(|program| ["--bin", program]).concat(), activity)
}

/// Builds the benchmarks' program.
pub(crate) fn bench(paths: &Paths, activity: &Activity) -> Result<(PathBuf, String)> {
    let how = build(paths, &["--bin", "herd-bench"], activity)?;
    Ok((path(paths, "herd-bench"), how))
}

/// Builds the `herd` command.
pub(crate) fn herd(paths: &Paths) -> Result<PathBuf> {
    build(paths, &["--bin", "herd"], &Activity::default())?;
    Ok(path(paths, "herd"))
}

/// Builds the example that writes the custom resource definitions.
pub(crate) fn crds(paths: &Paths) -> Result<PathBuf> {
    build(paths, &[], &Activity::default())?;
    Ok(paths.target.join("release/examples/crds"))
}

/// Where a program lies once it is built.
pub(crate) fn path(paths: &Paths, name: &str) -> PathBuf {
    paths.target.join("release").join(name)
}

fn build(paths: &Paths, what: &[&str], activity: &Activity) -> Result<String> {
    target::take(paths)?;
    let mut command = paths.cargo(&["build", "--release", "--workspace"]);
    command.args(what).args(EXAMPLE);
    let mut crates = 0;
    let (success, output) = run_watched(command, |line| {
        if let Some(name) = line.strip_prefix("Compiling ") {
            crates += 1;
            activity.set(&format!("crate {crates}, {name}"));
        }
    });
    if !success {
        bail!("{}", output.trim_end());
    }
    Ok(compiled(&output))
}
