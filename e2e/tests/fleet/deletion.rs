//! Nothing is left.

use std::time::Duration;

use anyhow::{Result, ensure};
use herd_e2e::{Kubectl, eventually, with_fleet};

use crate::objects::{KINDS, MODEL, ready, unified};

const GONE_WITHIN: Duration = Duration::from_mins(2);

fn deleted(kubectl: &Kubectl, name: &str) -> Result<()> {
    kubectl.run(&["delete", "llamadeployment", name])?;
    eventually("everything to go", GONE_WITHIN, || {
        let left = kubectl.list(KINDS, &format!("herd.dev/deployment={name}"))?;
        let names: Vec<_> = left.iter().map(|left| &left["metadata"]["name"]).collect();
        ensure!(names.is_empty(), "{names:?}");
        Ok(())
    })
}

#[test]
fn a_deployment_that_is_deleted_leaves_nothing() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-deleted")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&unified("served", MODEL, 1))?;
        ready(kubectl, "served")?;
        ensure!(!kubectl.list(KINDS, "herd.dev/deployment=served")?.is_empty(), "nothing to delete");
        deleted(kubectl, "served")
    })
}

#[test]
fn one_that_is_deleted_while_it_starts_leaves_nothing() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-starting")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&unified("starting", MODEL, 1))?;
        kubectl.watch("llamapool/starting-unified", GONE_WITHIN, |_| Ok(()))?;
        deleted(kubectl, "starting")
    })
}
