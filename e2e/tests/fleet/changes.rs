//! A changed deployment: new gangs in place of the old ones.

use anyhow::{Result, ensure};
use herd_e2e::with_fleet;
use serde_json::json;

use crate::objects::{MODEL, pods, ready, settled, unified};

#[test]
fn a_change_replaces_the_gangs_of_before() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-changed")?;
        let kubectl = namespace.kubectl();
        let mut object = unified("changed", MODEL, 1);
        kubectl.apply(&object)?;
        ready(kubectl, "changed")?;
        let before = pods(kubectl, "herd.dev/deployment=changed")?;
        object["spec"]["model"]["contextLength"] = json!(512);
        kubectl.apply(&object)?;
        // One gang, and not those of two revisions.
        kubectl.watch("llamapool/changed-unified", crate::objects::READY_WITHIN, |seen| {
            let targets = seen["spec"]["targets"].as_array().map_or(0, Vec::len);
            ensure!(targets == 1 && seen["metadata"]["generation"] != 1, "{}", seen["spec"]);
            Ok(())
        })?;
        ready(kubectl, "changed")?;
        settled(kubectl, "changed-unified", 1)?;
        let after = pods(kubectl, "herd.dev/deployment=changed")?;
        ensure!(after.len() == 1 && after != before, "{before:?} became {after:?}");
        Ok(())
    })
}
