//! LlamaPool -> gangs, status.

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use herd_api::{GangFailure, LlamaPool, labels, names};
use herd_control::gang::{Gang, PodId, Trouble, gangs};
use herd_control::plan::{self, Deletion, ObservedPool, PoolPlan, plan_pool};
use herd_control::revision::GangTemplate;
use herd_control::status::{Note, PoolView, notes, pool_status};
use herd_control::{Refusal, build, check_owner};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Resource as _, ResourceExt as _};

use crate::apply::{Manager, Objects};
use crate::context::Context;
use crate::error::ReconcileError;
use crate::nodes;

/// Hex digits of a gang's id.
const ID_DIGITS: usize = 8;
/// Pods made in one pass, up to the end of a gang: a pass that its deadline ends leaves a gang that lacks pods.
const MAX_PODS: usize = 256;

/// One pass; when the next one is due even if nothing changes.
pub(crate) async fn reconcile(
    context: &Context,
    namespace: &str,
    name: &str,
) -> Result<Option<Duration>, ReconcileError> {
    let client = || context.client.clone();
    let pools: Objects<LlamaPool> = Objects::new(Api::namespaced(client(), namespace), "LlamaPool");
    let pods: Objects<Pod> = Objects::new(Api::namespaced(client(), namespace), "Pod");
    let Some(mut pool) = pools.get(name).await? else { return Ok(None) };
    if pool.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let deployment = &pool.spec.deployment_ref.name;
    let selector = labels::pool_selector(deployment, pool.spec.role);
    // Listed anew: a cache would not have the pods of the last pass yet, and they would be made twice.
    let uid = pool.uid().unwrap_or_default();
    let mut gangs = gangs(&pods.owned(&selector, &uid).await?);
    nodes::explain(&context.client, &mut gangs).await;
    if let Err(refusal) = check_owner(&pool) {
        let last_failure = pool.status.as_ref().and_then(|status| status.last_failure.clone());
        let said = Said { refusal: Some(&refusal), last_failure: last_failure.as_ref() };
        write_status(context, &pools, &mut pool, &gangs, said).await?;
        return Ok(None);
    }
    let last_failure = pool.status.as_ref().and_then(|status| status.last_failure.clone());
    let observed = ObservedPool {
        uid: &uid,
        targets: &pool.spec.targets,
        gangs: &gangs,
        last_failure: last_failure.as_ref(),
    };
    let PoolPlan { create, delete, left, last_failure: failure, again_in } =
        plan_pool(observed, Timestamp::now());
    let about = pool.object_ref(&());
    let gives_up = failure != last_failure;
    let said = Said { refusal: None, last_failure: failure.as_ref() };
    let written = write_status(context, &pools, &mut pool, &gangs, said).await;
    let written = match written {
        // A gang that was given up is seen there alone once it is gone: without it the next one would be made at once.
        Err(error) if gives_up => return Err(error),
        other => other,
    };
    for Deletion { gang, pods: first, why } in delete {
        remove(&pods, first).await?;
        tell(context, &about, "DeleteGang", "GangDeleted", format!("gang {gang} goes: {why}")).await;
    }
    remove(&pods, left).await?;
    if !create.is_empty() {
        let revisions = Objects::new(Api::namespaced(client(), namespace), "ControllerRevision");
        match make(context, &pool, &create, &revisions, &pods, &about).await? {
            Made::All => {}
            Made::Some => return written.map(|()| Some(Duration::ZERO)),
            Made::Refused { revision, trouble } => {
                let failure = plan::failure(failure.as_ref(), &revision, &trouble, Timestamp::now());
                let said = Said { refusal: None, last_failure: Some(&failure) };
                write_status(context, &pools, &mut pool, &gangs, said).await?;
                // When it is tried again follows from the failure.
                return Ok(Some(Duration::ZERO));
            }
        }
    }
    written?;
    Ok(again_in.map(|wait| Duration::try_from(wait).unwrap_or_default()))
}

async fn remove(pods: &Objects<Pod>, ids: Vec<PodId>) -> Result<(), ReconcileError> {
    for PodId { name, uid } in ids {
        pods.delete(&name, Some(uid)).await?;
    }
    Ok(())
}

/// What became of the gangs that are to be made.
enum Made {
    All,
    /// As many as a pass has time for.
    Some,
    /// Until a pod of one of this revision was refused.
    Refused {
        revision: String,
        trouble: Trouble,
    },
}

/// Makes gangs.
async fn make(
    context: &Context,
    pool: &LlamaPool,
    create: &[String],
    revisions: &Objects<ControllerRevision>,
    pods: &Objects<Pod>,
    about: &ObjectReference,
) -> Result<Made, ReconcileError> {
    let (deployment, role) = (&pool.spec.deployment_ref.name, pool.spec.role);
    let namespace = pool.namespace().unwrap_or_default();
    let owner: OwnerReference = pool.controller_owner_ref(&()).unwrap_or_default();
    let mut templates: BTreeMap<&str, GangTemplate> = BTreeMap::new();
    let mut pods_made = 0;
    for revision in create {
        if pods_made >= MAX_PODS {
            return Ok(Made::Some);
        }
        if !templates.contains_key(revision.as_str()) {
            templates.insert(revision, template(revisions, deployment, revision).await?);
        }
        let template = &templates[revision.as_str()];
        let mut gang = uuid::Uuid::new_v4().simple().to_string();
        gang.truncate(ID_DIGITS);
        let input = build::PodInput {
            deployment,
            namespace: &namespace,
            owner: &owner,
            role,
            gang: &gang,
            revision,
            template,
            pod_groups: context.pod_groups,
        };
        let name = || names::revision(deployment, revision);
        let members = build::pods(input).map_err(|source| ReconcileError::Source { name: name(), source })?;
        pods_made += members.len();
        match make_gang(context, input, &members, pods).await {
            Ok(true) => {
                let message = format!("gang {gang} of revision {revision}");
                tell(context, about, "CreateGang", "GangCreated", message).await;
            }
            Ok(false) => {}
            Err(error) => {
                let Some(said) = error.refusal() else { return Err(error) };
                tracing::warn!(pool = pool.name_any(), namespace, "{error}");
                context.metrics.failed("pool", error.category());
                // What there is of it lacks pods, and goes in the next pass.
                return Ok(Made::Refused { revision: revision.clone(), trouble: Trouble::not_created(said) });
            }
        }
    }
    Ok(Made::All)
}

/// The leader first: a gang that lacks others, because this ended in the middle, is seen as one that lacks pods. False: its id
/// is taken, and is tried again with another one in the next pass.
async fn make_gang(
    context: &Context,
    input: build::PodInput<'_>,
    members: &[Pod],
    pods: &Objects<Pod>,
) -> Result<bool, ReconcileError> {
    for (index, pod) in members.iter().enumerate() {
        let Some(made) = pods.create(pod, Manager::Operator).await? else { return Ok(false) };
        if index > 0 {
            continue;
        }
        if let Some(group) = build::pod_group(input, &made) {
            let groups = Api::namespaced(context.client.clone(), input.namespace);
            let groups: Objects<PodGroup> = Objects::new(groups, "PodGroup");
            groups.create(&group, Manager::Operator).await?;
        }
    }
    Ok(true)
}

async fn template(
    revisions: &Objects<ControllerRevision>,
    deployment: &str,
    revision: &str,
) -> Result<GangTemplate, ReconcileError> {
    let name = names::revision(deployment, revision);
    let Some(stored) = revisions.get(&name).await? else {
        let reason = "it is not there".to_owned();
        return Err(ReconcileError::Invalid { kind: "ControllerRevision", name, reason });
    };
    Ok(GangTemplate::read(&stored)?)
}

/// What a status says of a pool beside its gangs.
#[derive(Clone, Copy)]
struct Said<'a> {
    refusal: Option<&'a Refusal>,
    last_failure: Option<&'a GangFailure>,
}

async fn write_status(
    context: &Context,
    pools: &Objects<LlamaPool>,
    pool: &mut LlamaPool,
    gangs: &[Gang],
    Said { refusal, last_failure }: Said<'_>,
) -> Result<(), ReconcileError> {
    let status = pool_status(PoolView { pool: &*pool, gangs, refusal, last_failure, now: Timestamp::now() });
    if pool.status.as_ref() == Some(&status) {
        return Ok(());
    }
    pools.patch_status(&pool.name_any(), &status).await?;
    let before = pool.status.as_ref().map_or(&[][..], |status| &status.conditions);
    for note in notes(before, &status.conditions) {
        context.tell(&pool.object_ref(&()), "Reconcile", note).await;
    }
    pool.status = Some(status);
    Ok(())
}

async fn tell(context: &Context, about: &ObjectReference, action: &str, reason: &str, message: String) {
    context.tell(about, action, Note { warning: false, reason: reason.to_owned(), message }).await;
}
