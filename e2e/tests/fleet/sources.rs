//! A model from a claim; from an image it is in every other test.

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Fleet, Kubectl, with_fleet};
use serde_json::json;

use crate::objects::{ready, unified, wait_for};
use crate::shared::golden;

const VOLUME: &str = "e2e-models";

/// A volume of the nodes' files, and a claim to it. The volume belongs to no namespace: it goes with this.
struct Volume<'a>(&'a Kubectl);

impl<'a> Volume<'a> {
    fn create(fleet: &'a Fleet, kubectl: &Kubectl) -> Result<Self> {
        let size = json!({"storage": "1Gi"});
        let volume = Self(fleet.kubectl());
        volume.remove()?;
        fleet.kubectl().apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": VOLUME},
            "spec": {
                "capacity": size, "accessModes": ["ReadOnlyMany"], "storageClassName": "",
                "hostPath": {"path": fleet.environment().models},
            },
        }))?;
        kubectl.apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
            "spec": {
                "accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": VOLUME,
                "resources": {"requests": size},
            },
        }))?;
        Ok(volume)
    }

    fn remove(&self) -> Result<()> {
        self.0.run(&["delete", "persistentvolume", VOLUME, "--ignore-not-found", "--wait=false"]).map(drop)
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("cannot delete volume {VOLUME}: {error:#}");
        }
    }
}

#[test]
fn a_model_in_a_claim_is_served() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-claim")?;
        let kubectl = namespace.kubectl();
        let _volume = Volume::create(fleet, kubectl)?;
        kubectl.apply(&unified("from-claim", "pvc://models/smollm2-135m-fbgemm-fp8", 3))?;
        ready(kubectl, "from-claim")?;
        let (request, expected) = golden(fleet)?.first().context("no request")?;
        let mut request = request.clone();
        "from-claim".clone_into(&mut request.model);
        // The digest too: it is the same for every source of the same files.
        assert_eq!(fleet.ask(&request)?, *expected);
        Ok(())
    })
}

#[test]
fn a_claim_that_is_not_there_is_named() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-no-claim")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&unified("no-claim", "pvc://nowhere", 1))?;
        let object = "llamadeployment/no-claim";
        let message = wait_for(kubectl, object, "Scheduled", "False", Some("Unschedulable"))?;
        ensure!(message.contains("\"nowhere\" not found"), "{message}");
        Ok(())
    })
}
