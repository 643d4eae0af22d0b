//! The gRPC door: `herd.v1.Inference`, health, reflection.

mod encode;
pub(crate) mod status;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::stream::{Stream, StreamExt};
use herd_listen::Bounded;
use herd_proto::internal::v1::grammar::Kind;
use herd_proto::internal::v1::{Choices, Grammar};
use herd_proto::v1::inference_server::{Inference, InferenceServer};
use herd_proto::v1::{self as wire, GenerateEvent, GenerateRequest, ListModelsRequest, ListModelsResponse};
use herd_text::Message;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::RequestError;
use crate::gateway::{GatewayError, Parts, Submitted};
use crate::observe::Api;
use crate::request::{FieldNames, GenerationRequest, GrammarRequest, Input, SamplingRequest, ShapingRequest};
use crate::request_id;
use crate::task::OwnedTask;

const NAMES: FieldNames = FieldNames {
    model: "model",
    input: "input",
    messages: "chat.messages",
    max_tokens: "sampling.max_tokens",
    temperature: "sampling.temperature",
    top_p: "sampling.top_p",
    stop: "sampling.stop",
    logprobs: "sampling.logprobs",
    n: "n",
    sampling: "sampling.",
};

/// Serves on `listener` until `closing` says otherwise, then until the last request has ended.
pub(crate) fn open(
    listener: TcpListener,
    parts: Arc<Parts>,
    mut closing: watch::Receiver<bool>,
    cut: CancellationToken,
) -> Result<OwnedTask, GatewayError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(herd_proto::DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("herd.v1.Inference")
            .with_service_name("grpc.health.v1.Health")
    };
    let v1 = reflection().build_v1()?;
    let v1alpha = reflection().build_v1alpha()?;
    let (health, health_service) = tonic_health::server::health_reporter();
    let limits = parts.limits.clone();
    let service = InferenceServer::new(Service { parts }).max_decoding_message_size(limits.body_bytes);
    let mut server = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(Duration::from_secs(15)))
        .http2_keepalive_timeout(Some(Duration::from_secs(15)))
        .max_concurrent_streams(limits.concurrent_requests as u32)
        .http2_max_header_list_size(64 << 10);
    Ok(OwnedTask::spawn(async move {
        health.set_serving::<InferenceServer<Service>>().await;
        let router =
            server.add_service(service).add_service(health_service).add_service(v1).add_service(v1alpha);
        let incoming = Bounded::new(listener, limits.connections, cut)
            .with_preface_within(limits.header_timeout)
            .into_stream();
        let shutdown = async move {
            let _ = closing.wait_for(|closing| *closing).await;
            health.set_not_serving::<InferenceServer<Service>>().await;
            health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        };
        if let Err(error) = router.serve_with_incoming_shutdown(incoming, shutdown).await {
            tracing::error!(%error, "the gRPC door ended");
        }
    }))
}

struct Service {
    parts: Arc<Parts>,
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut admitted = self.parts.admit(Api::Generate).map_err(|error| status::status(&error))?;
        let patience = grpc_timeout(request.metadata()).unwrap_or(Duration::MAX);
        let deadline = Instant::now() + patience.min(self.parts.limits.request_deadline);
        let header = request.metadata().get("x-request-id").and_then(|value| value.to_str().ok());
        let request_id = request_id::choose([Some(request.get_ref().request_id.as_str()), header]);
        let answer = match convert(request.into_inner(), request_id.clone(), deadline) {
            Ok(request) => self.start(request, admitted).await,
            Err(error) => {
                admitted.ended(Some(&error));
                Err(error)
            }
        };
        let name = |metadata: &mut tonic::metadata::MetadataMap| {
            if let Ok(value) = request_id.parse() {
                metadata.insert("x-request-id", value);
            }
        };
        match answer {
            Ok(stream) => {
                let mut response = Response::new(stream);
                name(response.metadata_mut());
                Ok(response)
            }
            Err(error) => {
                let mut status = status::status(&error);
                name(status.metadata_mut());
                Err(status)
            }
        }
    }

    async fn list_models(
        &self,
        _request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.parts.fleet.models();
        let models = models.into_iter().map(encode::model).collect();
        Ok(Response::new(ListModelsResponse { models }))
    }
}

impl Service {
    /// The stream, once its first event is there: what is refused until then is a status, not a broken stream.
    async fn start(
        &self,
        request: GenerationRequest,
        admitted: crate::observe::Admitted,
    ) -> Result<<Self as Inference>::GenerateStream, RequestError> {
        let Submitted { mut events, model, seed, prompts } =
            self.parts.submit(request, admitted, SystemTime::now()).await?;
        let prompt_tokens = prompts.first().map_or(0, Vec::len) as u32;
        let first = match events.next().await {
            Some(first) => first?,
            None => return Err(RequestError::Failed("the generation ended without an event".to_owned())),
        };
        let about = encode::About { seed, model_digest: model.digest, prompt_tokens };
        let events = futures::stream::once(std::future::ready(Ok(first))).chain(events);
        Ok(Box::pin(events.map(move |event| match event {
            Ok(event) => Ok(encode::event(event, &about)),
            Err(error) => Err(status::status(&error)),
        })))
    }
}

fn convert(
    request: GenerateRequest,
    request_id: String,
    deadline: Instant,
) -> Result<GenerationRequest, RequestError> {
    let GenerateRequest { model, input, sampling, n, request_id: _, best_of } = request;
    let input = match input {
        Some(wire::generate_request::Input::Text(text)) => Input::Text(text),
        Some(wire::generate_request::Input::Tokens(wire::TokenIds { ids })) => Input::Tokens(ids),
        Some(wire::generate_request::Input::Chat(wire::Chat { messages })) => Input::Chat(
            messages
                .into_iter()
                .map(|wire::ChatMessage { role, content }| Message { role, content })
                .collect(),
        ),
        None => {
            return Err(RequestError::invalid("input", "input is missing: set one of text, tokens, chat"));
        }
    };
    let wire::Sampling {
        max_tokens,
        temperature,
        top_p,
        seed,
        stop,
        logprobs,
        ignore_eos,
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        min_tokens,
        structured_output,
        stop_token_ids,
        include_stop_str_in_output,
        prompt_logprobs,
    } = sampling.unwrap_or_default();
    let max_tokens = max_tokens.map(u64::from);
    let shaping = ShapingRequest {
        top_k: u64::from(top_k),
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: logit_bias.into_iter().collect(),
        min_tokens: u64::from(min_tokens),
    };
    let grammar = structured_output.map(grammar);
    let sampling = SamplingRequest {
        max_tokens,
        temperature,
        top_p,
        seed,
        stop,
        stop_token_ids,
        include_stop: include_stop_str_in_output,
        logprobs,
        prompt_logprobs,
        ignore_eos,
        shaping,
        grammar,
    };
    Ok(GenerationRequest {
        model,
        inputs: vec![input],
        n: n.max(1),
        best_of: (best_of > 0).then_some(best_of),
        sampling,
        request_id,
        deadline,
        names: NAMES,
    })
}

fn grammar(output: wire::sampling::StructuredOutput) -> GrammarRequest {
    use wire::sampling::StructuredOutput as Output;
    let (field, kind) = match output {
        Output::JsonSchema(text) => ("json_schema", Kind::JsonSchema(text)),
        Output::Regex(text) => ("regex", Kind::Regex(text)),
        Output::Grammar(text) => ("grammar", Kind::Lark(text)),
        Output::Choice(wire::Choices { texts }) => ("choice", Kind::Choices(Choices { texts })),
    };
    let field = format!("{}{field}", NAMES.sampling);
    GrammarRequest { field, grammar: Grammar { kind: Some(kind) } }
}

/// `grpc-timeout`, as the gRPC over HTTP/2 specification has it.
fn grpc_timeout(metadata: &tonic::metadata::MetadataMap) -> Option<Duration> {
    let value = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit_and_nonsense_is_none() {
        let read = |value: &str| {
            let mut metadata = tonic::metadata::MetadataMap::new();
            metadata.insert("grpc-timeout", value.parse().unwrap());
            grpc_timeout(&metadata)
        };
        assert_eq!(read("2H"), Some(Duration::from_hours(2)));
        assert_eq!(read("3M"), Some(Duration::from_mins(3)));
        assert_eq!(read("15S"), Some(Duration::from_secs(15)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        assert_eq!(read("9n"), Some(Duration::from_nanos(9)));
        for nonsense in ["", "S", "1", "1x", "-1S", "123456789S"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }
}
