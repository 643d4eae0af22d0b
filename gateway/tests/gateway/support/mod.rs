//! What the tests are made of.

pub(crate) mod api_server;
pub(crate) mod fleet;
pub(crate) mod http;
pub(crate) mod scripted;

use std::sync::Arc;
use std::time::Duration;

use herd_gateway::{Discovery, FixedFleet, GangEndpoint, Gateway, GatewayOptions, Limits, ReservedPort};
use herd_proto::v1::inference_client::InferenceClient;
use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, TextModel};
use tonic::transport::Channel;

/// Nothing in a test takes this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Fails the test instead of hanging it.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happened")
}

pub(crate) fn fixture(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// The text files of the tiny model.
pub(crate) fn bundle() -> Vec<(String, Vec<u8>)> {
    let folder = fixture("tiny-llama31/tiny-llama31-bf16");
    BUNDLE_FILE_NAMES
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::fs::read(folder.join(name)).ok()?)))
        .collect()
}

/// The tiny model's tokenizer.
pub(crate) fn text_model() -> Arc<TextModel> {
    static MODEL: std::sync::LazyLock<Arc<TextModel>> = std::sync::LazyLock::new(built_text_model);
    Arc::clone(&MODEL)
}

fn built_text_model() -> Arc<TextModel> {
    let files: BundleFiles = bundle().into_iter().collect();
    Arc::new(TextModel::from_files(&files).unwrap())
}

/// A gateway on free ports.
pub(crate) struct Running<F = FixedFleet> {
    pub(crate) gateway: Gateway,
    pub(crate) fleet: Arc<F>,
}

/// In front of these leaders, all serving `tiny`, once all are Ready.
pub(crate) async fn gateway<L: AsRef<str>>(leaders: &[L]) -> Running {
    let limits = Limits { resume_wait: Duration::ZERO, ..Limits::default() };
    gateway_with(leaders, limits).await
}

pub(crate) fn endpoint(leader: &str) -> GangEndpoint {
    GangEndpoint { models: vec!["tiny".to_owned()], leader: leader.to_owned() }
}

pub(crate) async fn gateway_with<L: AsRef<str>>(leaders: &[L], limits: Limits) -> Running {
    let fleet = FixedFleet::new(leaders.iter().map(|leader| endpoint(leader.as_ref())).collect());
    gateway_of(fleet, limits, (!leaders.is_empty()).then_some(PATIENCE)).await
}

pub(crate) async fn gateway_of<F: Discovery + 'static>(
    fleet: F,
    limits: Limits,
    ready_within: Option<Duration>,
) -> Running<F> {
    let fleet = Arc::new(fleet);
    let any = "127.0.0.1:0".parse().unwrap();
    let (http, grpc) = (ReservedPort::reserve(any).unwrap(), ReservedPort::reserve(any).unwrap());
    let mut options = GatewayOptions::new(Arc::clone(&fleet) as _, http, grpc);
    options.limits = limits;
    options.ready_within = ready_within;
    Running { gateway: Gateway::start(options).await.unwrap(), fleet }
}

impl<F> Running<F> {
    pub(crate) async fn grpc(&self) -> InferenceClient<Channel> {
        InferenceClient::connect(format!("http://{}", self.gateway.addresses().grpc)).await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &serde_json::Value) -> http::Answer {
        http::post(self.gateway.addresses().http, path, &[], &serde_json::to_vec(body).unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> http::Answer {
        http::get(self.gateway.addresses().http, path).await
    }

    /// The value of a metric's line.
    pub(crate) async fn metric(&self, line: &str) -> f64 {
        let text = self.get("/metrics").await.text();
        let found = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or(0.0)
    }
}
