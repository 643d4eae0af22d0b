//! The operator ends and begins as it likes; the fleet does not depend on it.

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Fleet, get, metric, with_fleet};

use crate::objects::{pods, settled};
use crate::shared::{answers_right, deployed};

fn kill(fleet: &Fleet) -> Result<()> {
    let pod = fleet.system_pod("operator")?;
    let name = pod["metadata"]["name"].as_str().context("a pod without a name")?.to_owned();
    fleet.system().run(&["delete", "pod", &name, "--force", "--grace-period=0"]).map(drop)
}

#[test]
fn an_operator_killed_in_the_middle_of_a_change_ends_it() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        let selector = "herd.dev/deployment=smollm2";
        let before = pods(kubectl, selector)?;
        for gangs in [2, 1] {
            kubectl.run(&["scale", "llamapool", "smollm2-decode", &format!("--replicas={gangs}")])?;
            kill(fleet)?;
            settled(kubectl, "smollm2-decode", gangs)?;
        }
        let after = pods(kubectl, selector)?;
        ensure!(before == after, "a restart of the operator replaced a gang: {before:?} became {after:?}");
        answers_right(fleet)
    })
}

#[test]
fn what_changes_nothing_replaces_nothing() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        let before = pods(kubectl, "herd.dev/deployment=smollm2")?;
        kubectl.run(&["annotate", "llamadeployment", "smollm2", "example.org/note=1", "--overwrite"])?;
        kubectl.run(&["scale", "llamapool", "smollm2-decode", "--replicas=1"])?;
        kill(fleet)?;
        settled(kubectl, "smollm2-decode", 1)?;
        ensure!(before == pods(kubectl, "herd.dev/deployment=smollm2")?, "pods were replaced");
        Ok(())
    })
}

#[test]
fn the_operator_needs_at_most_40_mib() -> Result<()> {
    with_fleet(|fleet| {
        deployed(fleet)?;
        let pod = fleet.system_pod("operator")?;
        let ip = pod["status"]["podIP"].as_str().context("the operator has no address")?;
        let page = get(&format!("{ip}:8080"), "/metrics")?;
        let bytes = metric(&page, "process_resident_memory_bytes", "").context("no such metric")?;
        println!("operator: {:.1} MiB resident", bytes / f64::from(1 << 20));
        ensure!(bytes <= f64::from(40 << 20), "{bytes} bytes resident");
        Ok(())
    })
}
