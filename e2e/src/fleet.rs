//! The cluster that the tests share, with Herd installed.

use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow};
use herd_proto::v1::{GenerateRequest, Model};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::{Answer, Environment, Inference, Kubectl, Namespace, Traffic, diagnosis};

/// Where the chart is installed.
const SYSTEM: &str = "herd-system";

/// A cluster with Herd, and its gateway.
#[derive(Debug)]
pub struct Fleet {
    environment: Environment,
    kubectl: Kubectl,
    runtime: Runtime,
    inference: Inference,
    http: String,
    grpc: String,
}

impl Fleet {
    fn connect(environment: Environment) -> Result<Self> {
        let kubectl = Kubectl::new(environment.kubectl.clone());
        let gateway = kubectl.within(SYSTEM).get("service/herd-gateway")?;
        let ip = gateway["spec"]["clusterIP"].as_str().context("the gateway's Service has no cluster IP")?;
        let address = |name: &str| {
            let port =
                gateway["spec"]["ports"].as_array().into_iter().flatten().find(|port| port["name"] == name);
            let port = port.and_then(|port| port["port"].as_i64());
            Ok::<_, anyhow::Error>(format!(
                "{ip}:{}",
                port.with_context(|| format!("no port {name}: {gateway}"))?
            ))
        };
        let (http, grpc) = (address("http")?, address("grpc")?);
        let runtime = Runtime::new().context("start a runtime")?;
        let inference = {
            let _entered = runtime.enter();
            Inference::at(&grpc)?
        };
        Ok(Self { environment, kubectl, runtime, inference, http, grpc })
    }

    /// What the tests were given.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// In the namespace `default`.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// In the namespace of operator and gateway.
    pub fn system(&self) -> Kubectl {
        self.kubectl.within(SYSTEM)
    }

    /// "host:port" of the gateway's OpenAI API.
    pub fn http(&self) -> &str {
        &self.http
    }

    /// "host:port" of the gateway's gRPC.
    pub fn grpc(&self) -> &str {
        &self.grpc
    }

    /// A namespace for one test.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::create(&self.kubectl, name)
    }

    /// The gateway's answer.
    pub fn ask(&self, request: &GenerateRequest) -> Result<Answer> {
        self.runtime.block_on(self.inference.ask(request))
    }

    /// What `herd serve` or another gateway answers, at "host:port".
    pub fn ask_at(&self, address: &str, request: &GenerateRequest) -> Result<Answer> {
        self.runtime.block_on(async { Inference::at(address)?.ask(request).await })
    }

    /// Models that the gateway serves.
    pub fn models(&self) -> Result<Vec<Model>> {
        self.runtime.block_on(self.inference.models())
    }

    /// Streams through the gateway.
    pub fn traffic(&self, requests: impl IntoIterator<Item = (GenerateRequest, Answer)>) -> Traffic {
        Traffic::start(self.runtime.handle(), &self.inference, requests)
    }

    /// The one pod of a component of the chart, that is not about to go.
    pub fn system_pod(&self, component: &str) -> Result<Value> {
        let pods = self.system().list("pods", &format!("app.kubernetes.io/component={component}"))?;
        let pods: Vec<Value> =
            pods.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect();
        match <[Value; 1]>::try_from(pods) {
            Ok([pod]) => Ok(pod),
            Err(pods) => Err(anyhow!("{} pods of {component}: {pods:?}", pods.len())),
        }
    }
}

/// Runs a test on the cluster; where there is none, says so and passes. A test that fails shows the state of the fleet.
pub fn with_fleet(test: impl FnOnce(&'static Fleet) -> Result<()>) -> Result<()> {
    static FLEET: OnceLock<Result<Fleet, String>> = OnceLock::new();
    let environment = match Environment::find() {
        Ok(environment) => environment,
        Err(why) => {
            println!("skipped: {why}");
            return Ok(());
        }
    };
    let fleet = FLEET.get_or_init(|| Fleet::connect(environment).map_err(|error| format!("{error:#}")));
    let fleet = fleet.as_ref().map_err(|error| anyhow!("{error}"))?;
    let mut shown = ShownUnlessPassed { kubectl: &fleet.kubectl, passed: false };
    test(fleet)?;
    shown.passed = true;
    Ok(())
}

/// Also when a test panics, which is how assertions fail.
struct ShownUnlessPassed<'a> {
    kubectl: &'a Kubectl,
    passed: bool,
}

impl Drop for ShownUnlessPassed<'_> {
    fn drop(&mut self) {
        if !self.passed {
            diagnosis::print(self.kubectl);
        }
    }
}
