//! Writes how many gangs a pool has, where nobody else has changed that meanwhile.

use std::time::Duration;

use herd_api::{LlamaDeployment, LlamaPool, Role, names};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::observe::{Scaled, runs};
use crate::apply::Manager;
use crate::context::Context;

/// For all of it.
const DEADLINE: Duration = Duration::from_secs(10);
/// Writes of other fields of the pool can come between reading and writing.
const TRIES: usize = 3;

/// Why a pool was not scaled. The next decision sees what there is then.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScaleError {
    #[error("failed to scale {pool}: {source}")]
    Api { pool: String, source: Box<kube::Error> },
    #[error("{pool} was not scaled in {DEADLINE:?}")]
    Deadline { pool: String },
    #[error("{pool} is not scaled: {why}")]
    Changed { pool: String, why: &'static str },
}

/// From so many gangs to so many others.
pub(super) async fn scale(
    context: &Context,
    scaled: &Scaled,
    role: Role,
    from: i32,
    to: i32,
) -> Result<(), ScaleError> {
    let pool = names::pool(&scaled.validated.name, role);
    let written = tokio::time::timeout(DEADLINE, write(context, scaled, &pool, role, from, to)).await;
    written.unwrap_or(Err(ScaleError::Deadline { pool }))
}

/// What is watched may be older than a change of somebody else's: read anew, and written only over what was read.
async fn write(
    context: &Context,
    scaled: &Scaled,
    name: &str,
    role: Role,
    from: i32,
    to: i32,
) -> Result<(), ScaleError> {
    let namespace = &scaled.validated.namespace;
    let deployments: Api<LlamaDeployment> = Api::namespaced(context.client.clone(), namespace);
    let pools: Api<LlamaPool> = Api::namespaced(context.client.clone(), namespace);
    let failed = |source| ScaleError::Api { pool: name.to_owned(), source: Box::new(source) };
    let changed = |why| Err(ScaleError::Changed { pool: name.to_owned(), why });
    let mut tries = 0;
    loop {
        let deployment = deployments.get(&scaled.validated.name).await.map_err(failed)?;
        let now = Scaled::new(&deployment).filter(|now| now.uid == scaled.uid);
        let Some(now) = now else { return changed("it is somebody else's to scale now") };
        let Some(wanted) = now.validated.pools.iter().find(|pool| pool.role == role) else {
            return changed("its deployment has no such role now");
        };
        let pool = pools.get(name).await.map_err(failed)?;
        if !pool.owner_references().iter().any(|owner| owner.uid == scaled.uid) {
            return changed("it is another one now");
        }
        if runs(&pool, wanted) != from {
            return changed("somebody else has scaled it");
        }
        if !(wanted.min_replicas..=wanted.max_replicas).contains(&to) {
            return changed("its bounds are others now");
        }
        let version = pool.resource_version();
        let patch = Patch::Merge(json!({"metadata": {"resourceVersion": version}, "spec": {"replicas": to}}));
        let params =
            PatchParams { field_manager: Some(Manager::Scale.name().to_owned()), ..PatchParams::default() };
        tries += 1;
        match pools.patch(name, &params, &patch).await {
            Ok(_) => return Ok(()),
            Err(kube::Error::Api(status)) if status.is_conflict() && tries < TRIES => {}
            Err(error) => return Err(failed(error)),
        }
    }
}
