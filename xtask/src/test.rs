//! `cargo xtask test`, `lint` and `fmt`.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::paths::Paths;
use crate::step::{self, Outcome, Step, run_lanes, run_phases};
use crate::{cargo_test, cluster, e2e, machine, models, own_test, prometheus, tools};

/// Runs the checks in two lanes: lints, then clusters, beside the tests. The end-to-end tests follow alone, since the probes of
/// their pods fail for want of a processor. `fast` leaves out what needs downloaded models or a Kubernetes.
pub(crate) fn run(paths: &Paths, fast: bool) -> ExitCode {
    // What is missing all the same, the steps that need it say.
    if !fast
        && machine::is_root()
        && let Err(error) = machine::prepare()
    {
        println!("{error:#}");
    }
    let mut tests = Vec::new();
    if !fast {
        tests.push(Step::new("models", || match models::make(paths) {
            Ok(lines) => Outcome::one(true, lines.join("; "), String::new()),
            Err(error) => Outcome::one(false, String::new(), format!("{error:#}")),
        }));
    }
    tests.push(Step::new("tests", move || {
        // Without the program, the test that needs it says so.
        let prometheus = prometheus::program(paths, !fast).unwrap_or_else(|error| {
            eprintln!("prometheus: {error:#}");
            None
        });
        let command = test_command(paths, fast, prometheus.as_deref());
        let (success, output) = step::run(command);
        cargo_test::outcome(success, output)
    }));
    let mut others = lints(paths);
    if !fast {
        others.push(Step::new("cluster", || cluster::test(paths)));
    }
    let mut phases = vec![vec![tests, others]];
    if !fast {
        phases.push(vec![vec![e2e::step(paths, e2e::Options::default()), own_test::step(paths, None)]]);
    }
    run_phases(phases)
}

/// Runs everything of `test --fast` but the tests.
pub(crate) fn lint(paths: &Paths) -> ExitCode {
    run_lanes(vec![lints(paths)])
}

/// Formats the code.
pub(crate) fn fmt(paths: &Paths) -> Result<ExitCode> {
    let status = paths.cargo(&["fmt", "--all"]).status().context("cannot run cargo fmt")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tests of all crates.
fn test_command(paths: &Paths, fast: bool, prometheus: Option<&Path>) -> Command {
    let mut command =
        paths.cargo(&["test", "--release", "--workspace", "--no-fail-fast", "--", "--show-output"]);
    if !fast {
        command.env("HERD_FULL", "1");
    }
    if let Some(program) = prometheus {
        command.env(prometheus::PROGRAM, program);
    }
    command
}

fn lints(paths: &Paths) -> Vec<Step<'_>> {
    let clippy =
        paths.cargo(&["clippy", "--release", "--workspace", "--all-targets", "--", "--deny", "warnings"]);
    let mut doc = paths.cargo(&["doc", "--release", "--workspace", "--no-deps"]);
    doc.env("RUSTDOCFLAGS", "--deny warnings");
    vec![
        Step::command("format", paths.cargo(&["fmt", "--all", "--check"])),
        Step::new("licences, bans", || tools::deny(paths)),
        Step::command("clippy", clippy),
        Step::command("documentation", doc),
    ]
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn tests_are_told_where_prometheus_is() {
        let at = |path: &str| path.into();
        let paths = Paths { root: at("/clone"), cache: at("/c"), target: at("/t"), models: at("/m") };
        let told = |prometheus: Option<&Path>| {
            let command = test_command(&paths, true, prometheus);
            command
                .get_envs()
                .find(|(name, _)| *name == prometheus::PROGRAM)
                .map(|(_, value)| value.map(OsStr::to_owned))
        };
        assert_eq!(told(Some(Path::new("/c/prometheus"))), Some(Some("/c/prometheus".into())));
        assert_eq!(told(None), None);
    }
}
