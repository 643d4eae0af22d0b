//! Two controllers: what wakes them, how often they try, and how they end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use herd_api::{LlamaDeployment, LlamaPool, labels};
use herd_control::status::Note;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::controller::{Action, Config, Error};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

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

/// Runs both until `stop`.
pub(crate) async fn run(context: Arc<Context>, namespace: Option<&str>, stop: CancellationToken) {
    let deployments = deployments(Arc::clone(&context), namespace, stop.clone());
    let pools = pools(context, namespace, stop);
    tokio::join!(deployments, pools);
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
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

async fn deployments(context: Arc<Context>, namespace: Option<&str>, stop: CancellationToken) {
    let client = context.client.clone();
    let controller = Controller::new(api::<LlamaDeployment>(&client, namespace), watcher::Config::default());
    let all = controller.store();
    let (others, known) = (controller.store(), controller.store());
    let passes = controller
        .with_config(config())
        .owns(api::<LlamaPool>(&client, namespace), made())
        .owns(api::<Service>(&client, namespace), made())
        .owns(api::<PodDisruptionBudget>(&client, namespace), made())
        // When one goes or changes, a name may be free for another.
        .watches(api::<LlamaDeployment>(&client, namespace), watcher::Config::default(), move |changed| {
            sharing_a_name(&changed, &others)
        })
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(
            move |object, context| {
                let all = all.clone();
                async move {
                    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                    let pass = Box::pin(async {
                        deployment::reconcile(&context, &namespace, &name, &all.state()).await.map(|()| None)
                    });
                    watched(&context, "deployment", &namespace, &name, pass).await
                }
            },
            |object, error, context| retry(&object, error, &context),
            Arc::clone(&context),
        );
    drive(passes, "deployment", || context.metrics.managed("LlamaDeployment", known.len() as i64)).await;
}

async fn pools(context: Arc<Context>, namespace: Option<&str>, stop: CancellationToken) {
    let client = context.client.clone();
    let controller = Controller::new(api::<LlamaPool>(&client, namespace), watcher::Config::default());
    let known = controller.store();
    let passes = controller
        .with_config(config())
        .owns(api::<Pod>(&client, namespace), made())
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(
            |object, context| async move {
                let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                let pass = Box::pin(pool::reconcile(&context, &namespace, &name));
                watched(&context, "pool", &namespace, &name, pass).await
            },
            |object, error, context| retry(&object, error, &context),
            Arc::clone(&context),
        );
    drive(passes, "pool", || context.metrics.managed("LlamaPool", known.len() as i64)).await;
}

fn sharing_a_name(
    changed: &LlamaDeployment,
    all: &Store<LlamaDeployment>,
) -> Vec<ObjectRef<LlamaDeployment>> {
    let names = |of: &LlamaDeployment| {
        let mut names = of.spec.model.served_names.clone();
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

/// A pass with its deadline, counted.
async fn watched(
    context: &Context,
    controller: &'static str,
    namespace: &str,
    name: &str,
    pass: impl Future<Output = Result<Option<Duration>, ReconcileError>>,
) -> Result<Action, ReconcileError> {
    let began = Instant::now();
    let ended = tokio::time::timeout(DEADLINE, pass).await;
    let ended = ended.unwrap_or(Err(ReconcileError::Deadline(DEADLINE)));
    let outcome = if ended.is_ok() { "ok" } else { "error" };
    context.metrics.reconciled(controller, outcome, began.elapsed());
    if let Err(error) = &ended {
        tracing::warn!(controller, namespace, name, "{error}");
        context.metrics.failed(controller, error.category());
    } else {
        context.is_well(&format!("{controller}/{namespace}/{name}"));
    }
    Ok(Action::requeue(ended?.unwrap_or(RESYNC)))
}

/// Later and later; the object says why.
fn retry<K>(object: &Arc<K>, error: &ReconcileError, context: &Arc<Context>) -> Action
where
    K: Resource<DynamicType = ()>,
{
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let controller = if K::kind(&()) == "LlamaPool" { "pool" } else { "deployment" };
    let wait = context.failed(format!("{controller}/{namespace}/{name}"));
    let (about, context) = (object.object_ref(&()), Arc::clone(context));
    let note = Note { warning: true, reason: "ReconcileFailed".to_owned(), message: error.to_string() };
    // Ends by itself: an event has a deadline.
    tokio::spawn(async move { context.tell(&about, "Reconcile", note).await });
    Action::requeue(wait)
}

/// Polls the controller to its end.
async fn drive<K, Q>(
    passes: impl Stream<Item = Result<(ObjectRef<K>, Action), Error<ReconcileError, Q>>>,
    controller: &'static str,
    count: impl Fn(),
) where
    K: Resource<DynamicType = ()> + DeserializeOwned,
    Q: std::error::Error + 'static,
{
    let mut passes = std::pin::pin!(passes);
    while let Some(pass) = passes.next().await {
        count();
        match pass {
            // Said where it happened; and an object that went while it waited is no news.
            Ok(_) | Err(Error::ReconcilerFailed(..) | Error::ObjectNotFound(_)) => {}
            Err(error) => tracing::warn!(controller, "{error}"),
        }
    }
}
