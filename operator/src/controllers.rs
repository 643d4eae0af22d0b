//! Two controllers, and the autoscaler, which sees what they watch: what wakes them, how often they try, and how they end.

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use herd_api::{LlamaDeployment, LlamaPool, labels};
use herd_control::status::Note;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::DeserializeGuard;
use kube::runtime::controller::{Action, Config, Error};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::autoscale::{Autoscaler, AutoscalerOptions, Logs};
use crate::context::Context;
use crate::error::ReconcileError;
use crate::{deployment, pool};

/// A pass over one object ends within this.
const DEADLINE: Duration = Duration::from_mins(1);
/// Everything is looked at this often even if nothing changes.
const RESYNC: Duration = Duration::from_mins(5);
/// Objects of a kind worked on at once.
const CONCURRENCY: u16 = 8;
/// Changes of an object that follow each other closely are one.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// As watched: one that this operator cannot read, of a newer version, say, stops the watch of none but itself.
pub(crate) type Watched<K> = DeserializeGuard<K>;

/// Runs all until `stop`.
pub(crate) async fn run(
    context: Arc<Context>,
    namespace: Option<&str>,
    autoscaler: &AutoscalerOptions,
    logs: Logs,
    stop: CancellationToken,
) {
    let (autoscaler, news) = Autoscaler::new(autoscaler, namespace, logs);
    let client = &context.client;
    let of_deployments =
        Controller::new(api::<Watched<LlamaDeployment>>(client, namespace), watcher::Config::default());
    let of_pools = Controller::new(api::<Watched<LlamaPool>>(client, namespace), watcher::Config::default());
    let scaling = autoscaler.run(&context, of_deployments.store(), of_pools.store(), stop.clone());
    let of_deployments = of_deployments.reconcile_all_on(news);
    let deployments = deployments(of_deployments, Arc::clone(&context), namespace, stop.clone());
    let pools = pools(of_pools, Arc::clone(&context), namespace, stop);
    tokio::join!(deployments, pools, scaling);
}

/// Objects of a kind, of one namespace or all.
pub(crate) fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Only what the operator made.
fn made() -> watcher::Config {
    watcher::Config::default().labels(labels::MANAGED_BY_SELECTOR)
}

fn config() -> Config {
    Config::default().concurrency(CONCURRENCY).debounce(DEBOUNCE)
}

async fn deployments(
    controller: Controller<Watched<LlamaDeployment>>,
    context: Arc<Context>,
    namespace: Option<&str>,
    stop: CancellationToken,
) {
    let client = context.client.clone();
    let all = controller.store();
    let (others, known) = (controller.store(), controller.store());
    let passes = controller
        .with_config(config())
        .owns(api::<Watched<LlamaPool>>(&client, namespace), made())
        .owns(api::<Service>(&client, namespace), made())
        .owns(api::<PodDisruptionBudget>(&client, namespace), made())
        .owns(api::<Pod>(&client, namespace), watcher::Config::default().labels(labels::RESOLVES_SELECTOR))
        // When one goes or changes, a name may be free for another.
        .watches(
            api::<Watched<LlamaDeployment>>(&client, namespace),
            watcher::Config::default(),
            move |changed| sharing_a_name(&changed, &others),
        )
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(
            move |object, context| {
                let all = all.clone();
                async move {
                    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                    let pass = Box::pin(async {
                        deployment::reconcile(&context, &namespace, &name, &all.state()).await.map(|()| None)
                    });
                    watched(&context, "deployment", object.as_ref(), pass).await
                }
            },
            |object, _, context| retry(object.as_ref(), &context),
            Arc::clone(&context),
        );
    drive(passes, "deployment", &context, || context.metrics.managed("LlamaDeployment", known.len() as i64))
        .await;
}

async fn pools(
    controller: Controller<Watched<LlamaPool>>,
    context: Arc<Context>,
    namespace: Option<&str>,
    stop: CancellationToken,
) {
    let client = context.client.clone();
    let known = controller.store();
    let passes = controller
        .with_config(config())
        .owns(api::<Pod>(&client, namespace), made())
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(
            |object, context| async move {
                let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                let pass = Box::pin(pool::reconcile(&context, &namespace, &name));
                watched(&context, "pool", object.as_ref(), pass).await
            },
            |object, _, context| retry(object.as_ref(), &context),
            Arc::clone(&context),
        );
    drive(passes, "pool", &context, || context.metrics.managed("LlamaPool", known.len() as i64)).await;
}

fn sharing_a_name(
    changed: &Watched<LlamaDeployment>,
    all: &Store<Watched<LlamaDeployment>>,
) -> Vec<ObjectRef<Watched<LlamaDeployment>>> {
    let names = |of: &Watched<LlamaDeployment>| {
        let mut names = of.0.as_ref().map_or(Vec::new(), |of| of.spec.model.served_names.clone());
        names.push(of.name_any());
        names
    };
    let changed_names = names(changed);
    let others = all.state().into_iter().filter(|other| other.uid() != changed.uid());
    others
        .filter(|other| names(other).iter().any(|name| changed_names.contains(name)))
        .map(|other| ObjectRef::from_obj(other.as_ref()))
        .collect()
}

/// A pass with its deadline, counted; what fails is told where people look.
async fn watched<K: Resource<DynamicType = ()>>(
    context: &Context,
    controller: &'static str,
    object: &K,
    pass: impl Future<Output = Result<Option<Duration>, ReconcileError>>,
) -> Result<Action, ReconcileError> {
    let began = Instant::now();
    let ended = tokio::time::timeout(DEADLINE, pass).await;
    let ended = ended.unwrap_or(Err(ReconcileError::Deadline(DEADLINE)));
    let outcome = if ended.is_ok() { "ok" } else { "error" };
    context.metrics.reconciled(controller, outcome, began.elapsed());
    let name = ObjectRef::from_obj(object).to_string();
    match &ended {
        Ok(_) => context.is_well(&name),
        Err(error) => {
            tracing::warn!(controller, object = name, "{error}");
            context.metrics.failed(controller, error.category());
            if !matches!(error, ReconcileError::Told(_)) {
                let (reason, message) = ("ReconcileFailed".to_owned(), error.to_string());
                let note = Note { warning: true, reason, message };
                context.tell(&object.object_ref(&()), "Reconcile", note).await;
            }
        }
    }
    Ok(Action::requeue(ended?.unwrap_or(RESYNC)))
}

/// Later and later.
fn retry<K: Resource<DynamicType = ()>>(object: &K, context: &Context) -> Action {
    Action::requeue(context.failed(ObjectRef::from_obj(object).to_string()))
}

/// Polls the controller to its end.
async fn drive<K, Q>(
    passes: impl Stream<Item = Result<(ObjectRef<K>, Action), Error<ReconcileError, Q>>>,
    controller: &'static str,
    context: &Context,
    count: impl Fn(),
) where
    K: Resource<DynamicType = ()> + DeserializeOwned,
    Q: std::error::Error + 'static,
{
    let mut passes = std::pin::pin!(passes);
    while let Some(pass) = passes.next().await {
        count();
        match pass {
            // Said where it happened.
            Ok(_) | Err(Error::ReconcilerFailed(..)) => {}
            // It went while it waited for its next try.
            Err(Error::ObjectNotFound(object)) => context.is_well(&object.to_string()),
            Err(error) => tracing::warn!(controller, "{error}"),
        }
    }
}
