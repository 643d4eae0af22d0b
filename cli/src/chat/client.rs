//! Both of a gateway's front doors, as a chat needs them.

mod http;

use std::net::SocketAddr;
use std::pin::Pin;

use anyhow::Context as _;
use futures::{Stream, StreamExt as _};
use herd_proto::v1::generate_event::Event;
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::inference_client::InferenceClient;
use herd_proto::v1::{Chat, ChatMessage, GenerateRequest, ListModelsRequest, Sampling};
use tonic::transport::Channel;

use self::http::HttpClient;

/// One message of the conversation.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) role: &'static str,
    pub(super) content: String,
}

impl Turn {
    pub(super) fn system(content: String) -> Self {
        Self { role: "system", content }
    }

    pub(super) fn user(content: String) -> Self {
        Self { role: "user", content }
    }

    pub(super) fn assistant(content: String) -> Self {
        Self { role: "assistant", content }
    }
}

/// What is asked.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) model: &'a str,
    pub(super) turns: &'a [Turn],
    pub(super) temperature: f32,
    pub(super) max_tokens: Option<u32>,
}

/// The text of an answer as it comes; dropped, the server stops.
pub(super) type Pieces = Pin<Box<dyn Stream<Item = anyhow::Result<String>> + Send>>;

pub(super) enum Client {
    Http(HttpClient),
    Grpc(InferenceClient<Channel>),
}

impl Client {
    pub(super) fn http(url: &str) -> anyhow::Result<Self> {
        Ok(Self::Http(HttpClient::new(url)?))
    }

    pub(super) async fn grpc(address: SocketAddr) -> anyhow::Result<Self> {
        let client = InferenceClient::connect(format!("http://{address}")).await;
        Ok(Self::Grpc(client.with_context(|| format!("no gateway at {address}"))?))
    }

    /// Names of the served models.
    pub(super) async fn models(&mut self) -> anyhow::Result<Vec<String>> {
        match self {
            Self::Http(client) => client.models().await,
            Self::Grpc(client) => {
                let models = client.list_models(ListModelsRequest {}).await?.into_inner().models;
                Ok(models.into_iter().map(|model| model.name).collect())
            }
        }
    }

    pub(super) async fn answer(&mut self, ask: Ask<'_>) -> anyhow::Result<Pieces> {
        match self {
            Self::Http(client) => client.answer(ask).await,
            Self::Grpc(client) => grpc_answer(client, ask).await,
        }
    }
}

async fn grpc_answer(client: &mut InferenceClient<Channel>, ask: Ask<'_>) -> anyhow::Result<Pieces> {
    let Ask { model, turns, temperature, max_tokens } = ask;
    let messages =
        turns.iter().map(|turn| ChatMessage { role: turn.role.to_owned(), content: turn.content.clone() });
    let request = GenerateRequest {
        model: model.to_owned(),
        input: Some(Input::Chat(Chat { messages: messages.collect() })),
        sampling: Some(Sampling { temperature: Some(temperature), max_tokens, ..Sampling::default() }),
        ..GenerateRequest::default()
    };
    let events = client.generate(request).await.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    Ok(Box::pin(events.into_inner().filter_map(|event| async {
        match event {
            Ok(event) => match event.event {
                Some(Event::Delta(delta)) => Some(Ok(delta.text)),
                _ => None,
            },
            Err(status) => Some(Err(anyhow::anyhow!("{}", status.message()))),
        }
    })))
}
