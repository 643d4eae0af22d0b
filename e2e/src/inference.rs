//! A client of `herd.v1`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use herd_proto::v1::inference_client::InferenceClient;
use herd_proto::v1::{GenerateRequest, ListModelsRequest, Model};
use tonic::transport::{Channel, Endpoint};

use crate::Answer;

/// For a whole answer, on a machine that does much else, and where a gang may have to come back first.
const WITHIN: Duration = Duration::from_mins(5);

/// A gateway, or `herd serve`.
#[derive(Clone, Debug)]
pub struct Inference(InferenceClient<Channel>);

impl Inference {
    /// At "host:port"; connects when it is first asked.
    pub fn at(address: &str) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("no address: {address}"))?
            .connect_timeout(Duration::from_secs(10));
        Ok(Self(InferenceClient::new(endpoint.connect_lazy())))
    }

    /// The whole answer.
    pub async fn ask(&self, request: &GenerateRequest) -> Result<Answer> {
        let mut client = self.0.clone();
        let asked = async {
            let mut stream = client.generate(request.clone()).await?.into_inner();
            let mut events = Vec::new();
            while let Some(event) = stream.message().await? {
                events.push(event);
            }
            Ok::<_, tonic::Status>(events)
        };
        let about = || format!("Generate of model {:?}", request.model);
        let events = tokio::time::timeout(WITHIN, asked).await.with_context(about)?.with_context(about)?;
        Answer::of(request.n.max(1), events).with_context(about)
    }

    /// Models that are served.
    pub async fn models(&self) -> Result<Vec<Model>> {
        let mut client = self.0.clone();
        let listed = tokio::time::timeout(WITHIN, client.list_models(ListModelsRequest {})).await;
        Ok(listed.context("ListModels")?.context("ListModels")?.into_inner().models)
    }
}
