//! Reads and writes of one object each, with what failed on what.

use std::fmt::Debug;

use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::error::ReconcileError;

/// Field manager of all that the operator decides.
const MANAGER: &str = "herd-operator";
/// Field manager of a pool's replicas: they are written once, when the pool is made, and then by the autoscaler.
const SCALE_MANAGER: &str = "herd-scale";

/// Objects of one kind in one namespace.
pub(crate) struct Objects<K> {
    api: Api<K>,
    kind: &'static str,
}

impl<K> Objects<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize,
{
    pub(crate) fn new(api: Api<K>, kind: &'static str) -> Self {
        Self { api, kind }
    }

    fn failed(&self, action: &'static str, name: &str) -> impl FnOnce(kube::Error) -> ReconcileError {
        let (kind, name) = (self.kind, name.to_owned());
        move |source| ReconcileError::Api { action, kind, name, source: Box::new(source) }
    }

    pub(crate) async fn get(&self, name: &str) -> Result<Option<K>, ReconcileError> {
        self.api.get_opt(name).await.map_err(self.failed("read", name))
    }

    /// Those that `selector` finds and `owner` owns.
    pub(crate) async fn owned(&self, selector: &str, owner: &str) -> Result<Vec<K>, ReconcileError> {
        let listed = self.api.list(&ListParams::default().labels(selector)).await;
        let listed = listed.map_err(self.failed("list", selector))?;
        Ok(listed.items.into_iter().filter(|object| is_owned(object.owner_references(), owner)).collect())
    }

    /// Creates it as the first of its name; `None`: there is one.
    pub(crate) async fn create(&self, object: &K, manager: Manager) -> Result<Option<K>, ReconcileError> {
        let params = PostParams { field_manager: Some(manager.name().to_owned()), ..PostParams::default() };
        match self.api.create(&params, object).await {
            Ok(created) => Ok(Some(created)),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(None),
            Err(error) => Err(self.failed("create", &object.name_any())(error)),
        }
    }

    /// Makes the one there is what `object` says, where it is owned by the same owner.
    pub(crate) async fn apply(&self, object: &K) -> Result<(), ReconcileError> {
        let name = object.name_any();
        let there = self.api.get_metadata_opt(&name).await.map_err(self.failed("read", &name))?;
        let owner = object.owner_references().first().map_or("", |owner| owner.uid.as_str());
        if there.is_some_and(|there| !is_owned(there.owner_references(), owner)) {
            return Err(ReconcileError::Foreign { kind: self.kind, name });
        }
        let params = PatchParams::apply(MANAGER).force();
        self.api.patch(&name, &params, &Patch::Apply(object)).await.map_err(self.failed("apply", &name))?;
        Ok(())
    }

    pub(crate) async fn patch_status(
        &self,
        name: &str,
        status: &impl Serialize,
    ) -> Result<(), ReconcileError> {
        let body = json!({"apiVersion": K::api_version(&()), "kind": K::kind(&()), "status": status});
        let params = PatchParams::apply(MANAGER).force();
        match self.api.patch_status(name, &params, &Patch::Apply(body)).await {
            Ok(_) => Ok(()),
            // It was deleted meanwhile: nobody is left to read it.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(self.failed("write the status of", name)(error)),
        }
    }

    /// Deletes this very object; one that is gone, or another of its name, is none of ours.
    pub(crate) async fn delete(&self, name: &str, uid: Option<String>) -> Result<(), ReconcileError> {
        let preconditions = uid.map(|uid| Preconditions { uid: Some(uid), resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::background() };
        match self.api.delete(name, &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
            Err(error) => Err(self.failed("delete", name)(error)),
        }
    }
}

/// Who writes.
#[derive(Clone, Copy)]
pub(crate) enum Manager {
    Operator,
    Scale,
}

impl Manager {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Operator => MANAGER,
            Self::Scale => SCALE_MANAGER,
        }
    }
}

fn is_owned(owners: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference], uid: &str) -> bool {
    owners.iter().any(|owner| owner.uid == uid)
}
