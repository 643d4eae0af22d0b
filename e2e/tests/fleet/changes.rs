//! A changed deployment: new gangs in place of the old ones.

use anyhow::{Result, ensure};
use herd_e2e::with_fleet;
use serde_json::json;

use crate::objects::{MODEL, READY_WITHIN, pods, ready, unified};

#[test]
fn a_change_replaces_the_gangs_of_before() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-changed")?;
        let kubectl = namespace.kubectl();
        let mut object = unified("changed", MODEL, 1);
        kubectl.apply(&object)?;
        ready(kubectl, "changed")?;
        let before = pods(kubectl, "herd.dev/deployment=changed")?;
        let pool = "llamapool/changed-unified";
        let first = kubectl.watch(pool, READY_WITHIN, |seen| Ok(seen["spec"]["targets"].clone()))?;
        object["spec"]["model"]["contextLength"] = json!(512);
        kubectl.apply(&object)?;
        // One gang, of the new revision: not one of each.
        kubectl.watch(pool, READY_WITHIN, |seen| {
            let (targets, gangs) = (&seen["spec"]["targets"], &seen["status"]["gangs"]);
            ensure!(*targets != first, "{targets}");
            let only = |list: &serde_json::Value| list.as_array().is_some_and(|list| list.len() == 1);
            ensure!(only(targets) && only(gangs), "{targets}, {gangs}");
            let (target, gang) = (&targets[0], &gangs[0]);
            ensure!(gang["revision"] == target["revision"] && gang["phase"] == "Ready", "{targets}, {gangs}");
            Ok(())
        })?;
        let after = pods(kubectl, "herd.dev/deployment=changed")?;
        ensure!(after.len() == 1 && after != before, "{before:?} became {after:?}");
        Ok(())
    })
}
