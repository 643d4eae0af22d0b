//! The fleet of a cluster: the leaders' Services say which names there are, their `EndpointSlice`s which gangs.

mod decisions;
mod snapshot;

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use herd_api::labels;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Discovery, FleetSnapshot};
use crate::task::OwnedTask;
use decisions::Decisions;
use snapshot::{Found, Problems};

/// The API server ends a watch after so many seconds. One that it did not end is dead a little later and made again.
const WATCH_SECONDS: u32 = 60;
/// For the API server to say anything: longer than a watch may be silent.
const READ: Duration = Duration::from_secs(90);
const CONNECT: Duration = Duration::from_secs(5);
const WRITE: Duration = Duration::from_secs(15);

/// The gangs behind the leaders' Services of a cluster, followed for as long as it is held. While the API server is away,
/// what it said last stays.
#[derive(Debug)]
pub struct KubernetesFleet {
    found: watch::Receiver<Option<FleetSnapshot>>,
    decisions: watch::Receiver<Decisions>,
    _tasks: [OwnedTask; 2],
}

/// A cluster that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// Neither a pod's service account nor a kubeconfig.
    #[error("failed to find a Kubernetes API server")]
    Config(#[from] kube::config::InferConfigError),
    /// What was found cannot be used.
    #[error("failed to make a Kubernetes client")]
    Client(#[source] Box<kube::Error>),
}

impl KubernetesFleet {
    /// Of the cluster that this process runs in, or that its kubeconfig names. `None`: of all namespaces.
    pub async fn connect(namespace: Option<&str>) -> Result<Self, KubernetesError> {
        let mut config = Config::infer().await?;
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(READ);
        config.write_timeout = Some(WRITE);
        // Else the time that a connection was idle would count.
        config.reset_reader_on_write = true;
        let client = Client::try_from(config).map_err(|error| KubernetesError::Client(Box::new(error)))?;
        Ok(Self::start(&client, namespace))
    }

    /// Of this client's cluster.
    pub fn start(client: &Client, namespace: Option<&str>) -> Self {
        let services = api(client, namespace);
        let slices = api(client, namespace);
        let (sender, found) = watch::channel(None);
        let (decided, decisions) = watch::channel(Decisions::new());
        let deciding = decisions::follow(client.clone(), namespace.map(str::to_owned), decided);
        let tasks = [OwnedTask::spawn(follow(services, slices, sender)), OwnedTask::spawn(deciding)];
        Self { found, decisions, _tasks: tasks }
    }
}

impl Discovery for KubernetesFleet {
    fn watch(&self) -> watch::Receiver<Option<FleetSnapshot>> {
        self.found.clone()
    }

    fn decisions(&self) -> Option<watch::Receiver<Decisions>> {
        Some(self.decisions.clone())
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Publishes what both watches have found, once both have listed, and with every change.
async fn follow(
    services: Api<PartialObjectMeta<Service>>,
    slices: Api<EndpointSlice>,
    sender: watch::Sender<Option<FleetSnapshot>>,
) {
    let mut services = Watch::new("Services", services, |service| {
        service.annotations_mut().retain(|key, _| key == labels::SERVED_NAMES);
    });
    let mut slices = Watch::new("EndpointSlices", slices, |slice| slice.annotations_mut().clear());
    let mut told = Problems::default();
    loop {
        tokio::select! {
            () = services.changed() => {}
            () = slices.changed() => {}
        }
        if !(services.listed && slices.listed) {
            continue;
        }
        let (services, slices) = (services.store.state(), slices.store.state());
        let Found { snapshot, problems } =
            snapshot::snapshot(services.iter().map(Arc::as_ref), slices.iter().map(Arc::as_ref));
        if problems != told {
            problems.tell();
            told = problems;
        }
        sender.send_if_modified(|current| {
            let modified = current.as_ref() != Some(&snapshot);
            if modified {
                let FleetSnapshot { models, gangs, doubted } = &snapshot;
                let (models, gangs, doubted) = (models.len(), gangs.len(), doubted.len());
                info!(models, gangs, doubted, "the fleet changed");
                *current = Some(snapshot);
            }
            modified
        });
    }
}

type Events<K> = Pin<Box<dyn Stream<Item = watcher::Result<watcher::Event<K>>> + Send>>;

/// What the cluster has of one kind, as far as gateways look for it.
struct Watch<K: Resource<DynamicType = ()> + Clone + 'static> {
    kind: &'static str,
    events: Events<K>,
    store: Store<K>,
    /// The store has been whole once. Listing anew replaces it in one piece.
    listed: bool,
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    /// `shrink` drops what nobody reads.
    fn new(kind: &'static str, api: Api<K>, shrink: impl Fn(&mut K) + Send + 'static) -> Self {
        let selector = format!("{}={}", labels::ENDPOINTS, labels::ENDPOINTS_LEADERS);
        let config = watcher::Config::default().labels(&selector).timeout(WATCH_SECONDS);
        let (store, writer) = reflector::store();
        let events = watcher(api, config)
            .default_backoff()
            .modify(move |object| {
                object.managed_fields_mut().clear();
                shrink(object);
            })
            .reflect(writer)
            .boxed();
        Self { kind, events, store, listed: false }
    }

    /// Resolves when the store has changed. Safe to cancel.
    async fn changed(&mut self) {
        loop {
            match self.events.next().await {
                Some(Ok(watcher::Event::InitDone)) => {
                    self.listed = true;
                    return;
                }
                Some(Ok(watcher::Event::Apply(_) | watcher::Event::Delete(_))) => return,
                Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_))) => {}
                // Any: the watch goes on, after a pause.
                Some(Err(error)) => warn!(%error, "failed to watch {}", self.kind),
                // The backoff gives up never.
                None => std::future::pending().await,
            }
        }
    }
}
