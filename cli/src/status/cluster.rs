//! What a cluster says: its API server, and the gateway behind it.

use std::time::Duration;

use anyhow::{Context as _, bail};
use herd_api::{LlamaDeployment, LlamaPool};
use herd_gateway::FleetReport;
use http::Request;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::{Api, Client, Config, Resource};
use serde_json::Value;
use tokio::time::timeout;

use super::overview::Overview;

/// For the API server to answer, and for the gateway behind it.
const DEADLINE: Duration = Duration::from_secs(10);

/// Where LlamaDeployments are looked for.
#[derive(Clone, Debug)]
pub(super) enum Where {
    /// The kubeconfig's namespace.
    Current,
    Namespace(String),
    Everywhere,
}

/// A cluster, as the kubeconfig names it.
pub(super) struct Cluster {
    client: Client,
    /// None: all.
    namespace: Option<String>,
    /// Of the gateway's report, through the API server.
    report: String,
}

impl Cluster {
    pub(super) async fn connect(place: Where, namespace: String, service: String) -> anyhow::Result<Self> {
        let mut config =
            Config::infer().await.context("no cluster: there is no kubeconfig that can be used")?;
        config.connect_timeout = Some(DEADLINE);
        config.read_timeout = Some(DEADLINE);
        let own = config.default_namespace.clone();
        let client = Client::try_from(config).context("the kubeconfig cannot be used")?;
        Ok(Self {
            client,
            namespace: match place {
                Where::Current => Some(own),
                Where::Namespace(namespace) => Some(namespace),
                Where::Everywhere => None,
            },
            report: format!("/api/v1/namespaces/{namespace}/services/http:{service}:http/proxy/fleet.json"),
        })
    }

    pub(super) async fn look(&self, name: Option<&str>) -> anyhow::Result<Overview> {
        let (deployments, pools, report) =
            tokio::join!(self.list::<LlamaDeployment>(), self.list::<LlamaPool>(), self.report());
        let mut deployments = deployments?;
        if let Some(name) = name {
            deployments
                .retain(|object| object.pointer("/metadata/name").and_then(Value::as_str) == Some(name));
            if deployments.is_empty() {
                bail!("there is no LlamaDeployment {name}");
            }
        }
        Ok(Overview::of_cluster(&deployments, &pools?, report))
    }

    /// As they are, so that another version of the operator can be looked at.
    async fn list<K: Resource<DynamicType = ()>>(&self) -> anyhow::Result<Vec<Value>> {
        let kind = ApiResource::erase::<K>(&());
        let api: Api<DynamicObject> = match &self.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &kind),
            None => Api::all_with(self.client.clone(), &kind),
        };
        let what = || format!("cannot list {}", kind.plural);
        let listed = timeout(DEADLINE, api.list(&ListParams::default())).await.with_context(what)?;
        let objects = listed.with_context(what)?.items.into_iter().map(serde_json::to_value);
        Ok(objects.collect::<Result<_, _>>()?)
    }

    async fn report(&self) -> Result<FleetReport, String> {
        let away = |problem: &str| {
            format!("the gateway does not answer, so load and times are not shown: {problem}")
        };
        let request =
            Request::get(&self.report).body(Vec::new()).map_err(|error| away(&error.to_string()))?;
        match timeout(DEADLINE, self.client.request::<FleetReport>(request)).await {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(error)) => Err(away(&error.to_string())),
            Err(_) => Err(away(&format!("nothing within {DEADLINE:?}"))),
        }
    }
}
