//! A model from a claim and from a hub; from an image it is in every other test.

use std::collections::BTreeMap;
use std::fs;
use std::net::UdpSocket;
use std::sync::{Arc, PoisonError};

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Fleet, Kubectl, eventually, with_fleet};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;

use crate::hub::{Hub, HubFile, REPOSITORY, State};
use crate::objects::{READY_WITHIN, pods, ready, unified, wait_for};
use crate::server::Request;
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

/// Of the FP8 checkpoint, on the machine.
const CHECKPOINT: &str = "smollm2-135m-fbgemm-fp8";
pub(crate) const TOKEN: &str = "hf_right";
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A hub on the machine that has the checkpoint on its branch, and asks for a token.
pub(crate) struct Machine {
    pub(crate) hub: Hub,
    endpoint: String,
    /// Runs the servers.
    _runtime: Runtime,
}

impl Machine {
    pub(crate) fn start(fleet: &Fleet) -> Result<Self> {
        let folder = fleet.environment().models.join(CHECKPOINT);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let entry = entry?;
            let bytes = fs::read(entry.path())?;
            let oid = format!("{:x}", Sha256::digest(&bytes));
            let file = HubFile { bytes: Arc::new(bytes), oid, is_large: true };
            files.insert(entry.file_name().to_string_lossy().into_owned(), file);
        }
        let state = State {
            commits: BTreeMap::from([(COMMIT.to_owned(), files)]),
            branches: [("main".to_owned(), COMMIT.to_owned())].into(),
            token: Some(TOKEN.to_owned()),
            ..State::default()
        };
        // As pods see the machine: from where it sees the cluster.
        let towards = UdpSocket::bind("0.0.0.0:0")?;
        towards.connect(fleet.http())?;
        let address = towards.local_addr()?.ip().to_string();
        let runtime = Runtime::new()?;
        let any = format!("{address}:0");
        let hub = runtime.block_on(Hub::listen(state, &any, &any, &address));
        let endpoint = hub.api.url();
        Ok(Self { hub, endpoint, _runtime: runtime })
    }

    /// Times that its branch was asked for.
    fn resolved(&self) -> usize {
        let is_question = |request: &&Request| request.path().contains("/revision/");
        self.hub.api.seen().iter().filter(is_question).count()
    }

    pub(crate) fn deployment(&self, name: &str, secret: &str) -> Value {
        let mut object = unified(name, &format!("hf://{REPOSITORY}"), 3);
        object["spec"]["model"]["secretRef"] = json!({"name": secret});
        let endpoint = json!({"name": "HF_ENDPOINT", "value": self.endpoint});
        if let Some(env) = object["spec"]["worker"]["env"].as_array_mut() {
            env.push(endpoint);
        }
        object
    }
}

pub(crate) fn secret(name: &str, token: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"token": token}})
}

#[test]
fn a_model_of_a_hub_is_pinned_and_served() -> Result<()> {
    with_fleet(|fleet| {
        let machine = Machine::start(fleet)?;
        let namespace = fleet.namespace("e2e-hub")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&secret("hub", TOKEN))?;
        kubectl.apply(&machine.deployment("from-hub", "hub"))?;
        ready(kubectl, "from-hub")?;
        let (request, expected) = golden(fleet)?.first().context("no request")?;
        let mut request = request.clone();
        "from-hub".clone_into(&mut request.model);
        assert_eq!(fleet.ask(&request)?, *expected);
        let revisions = kubectl.list("controllerrevisions", "")?;
        let pins: Vec<&str> =
            revisions.iter().filter_map(|one| one["data"]["download"]["pin"].as_str()).collect();
        ensure!(pins.len() == 1 && pins[0].starts_with(COMMIT), "{revisions:?}");
        eventually("the pod that asked to go", READY_WITHIN, || {
            ensure!(kubectl.list("pods", "herd.dev/resolves")?.is_empty(), "it is there");
            Ok(())
        })?;

        // The branch moves, to where there is nothing, and the gang is lost.
        let asked = machine.resolved();
        {
            let mut state = machine.hub.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.branches.insert("main".to_owned(), LATER.to_owned());
        }
        let before = pods(kubectl, "herd.dev/rank=0")?;
        let (pod, _) = before.first().context("no pod")?;
        kubectl.run(&["delete", "pod", pod, "--wait=false"])?;
        kubectl.watch("llamapool/from-hub-unified", READY_WITHIN, |seen| {
            ensure!(
                seen["status"]["readyReplicas"] == 1 && seen["status"]["drainingReplicas"] == 0,
                "{seen}"
            );
            ensure!(pods(kubectl, "herd.dev/rank=0")? != before, "the same pod");
            Ok(())
        })?;
        assert_eq!(machine.resolved(), asked);
        assert_eq!(fleet.ask(&request)?, *expected);
        Ok(())
    })
}

#[test]
fn a_token_that_is_wrong_is_told_and_can_be_corrected() -> Result<()> {
    with_fleet(|fleet| {
        let machine = Machine::start(fleet)?;
        let namespace = fleet.namespace("e2e-token")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&machine.deployment("gated", "hub"))?;
        let object = "llamadeployment/gated";
        let missing = Some("CreateContainerConfigError");
        let message = wait_for(kubectl, object, "ModelAvailable", "False", missing)?;
        ensure!(message.contains("\"hub\" not found"), "{message}");
        kubectl.apply(&secret("hub", "hf_wrong"))?;
        let message = wait_for(kubectl, object, "ModelAvailable", "False", Some("SourceUnauthorized"))?;
        ensure!(message.contains("the token of Secret hub is not valid"), "{message}");
        ensure!(!message.contains("hf_wrong"), "{message}");
        kubectl.apply(&secret("hub", TOKEN))?;
        ready(kubectl, "gated")
    })
}
