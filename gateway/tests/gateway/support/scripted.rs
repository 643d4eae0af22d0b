//! A leader that answers what the test tells it to.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt};
use herd_proto::internal::v1::worker_server::{Worker, WorkerServer};
use herd_proto::internal::v1::*;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, WatchStream};
use tonic::{Request, Response, Status};

use super::{bundle, text_model};

pub(crate) type Events = mpsc::Receiver<Result<DecodeEvent, Status>>;
type Script = Arc<dyn Fn(DecodeRequest) -> Result<Events, Status> + Send + Sync>;

/// What the leader says of itself, and what it does.
pub(crate) struct Leader {
    pub(crate) description: DescribeResponse,
    pub(crate) script: Script,
    /// Files by name.
    pub(crate) bundle: Vec<(String, Vec<u8>)>,
}

/// Unified, Ready, and answering as `script` says.
pub(crate) fn leader(
    script: impl Fn(DecodeRequest) -> Result<Events, Status> + Send + Sync + 'static,
) -> Leader {
    let description = DescribeResponse {
        gang_id: "gang".to_owned(),
        epoch: 7,
        role: Role::Unified.into(),
        revision: "revision".to_owned(),
        model_digest: "digest".to_owned(),
        kv_fingerprint: "fingerprint".to_owned(),
        tensor: 1,
        pipeline: 1,
        context_length: 512,
        vocab_size: 1024,
        block_tokens: 64,
        kv_blocks: 64,
        max_sequences: 8,
    };
    Leader { description, script: Arc::new(script), bundle: bundle() }
}

/// A running leader.
pub(crate) struct Scripted {
    pub(crate) address: String,
    pub(crate) watch: watch::Sender<WatchEvent>,
    /// Every Decode request, in order.
    pub(crate) calls: Arc<Mutex<Vec<DecodeRequest>>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Leader {
    pub(crate) fn with(mut self, change: impl FnOnce(&mut DescribeResponse)) -> Self {
        change(&mut self.description);
        self
    }

    pub(crate) async fn start(self) -> Scripted {
        self.start_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub(crate) async fn start_at(self, address: SocketAddr) -> Scripted {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let Self { description, script, bundle } = self;
        let event = WatchEvent {
            sequence: 1,
            phase: Phase::Ready.into(),
            role: description.role,
            load: Some(Load::default()),
        };
        let watch = watch::Sender::new(event);
        let calls = Arc::default();
        let service =
            Service { description, script, bundle, watch: watch.clone(), calls: Arc::clone(&calls) };
        let server = tonic::transport::Server::builder()
            .add_service(WorkerServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { server.await.unwrap() });
        Scripted { address, watch, calls, server }
    }
}

impl Scripted {
    pub(crate) fn phase(&self, phase: Phase) {
        self.watch.send_modify(|event| event.phase = phase.into());
    }

    pub(crate) fn calls(&self) -> Vec<DecodeRequest> {
        self.calls.lock().unwrap().clone()
    }
}

struct Service {
    description: DescribeResponse,
    script: Script,
    bundle: Vec<(String, Vec<u8>)>,
    watch: watch::Sender<WatchEvent>,
    calls: Arc<Mutex<Vec<DecodeRequest>>>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Service {
    type WatchStream = Answers<WatchEvent>;
    type DecodeStream = ReceiverStream<Result<DecodeEvent, Status>>;
    type AttachStream = Answers<DecodeEvent>;
    type PrefillStream = Answers<PrefillEvent>;
    type GetBundleStream = Answers<BundleChunk>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(self.description.clone()))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(Box::pin(WatchStream::new(self.watch.subscribe()).map(Ok))))
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        let request = request.into_inner();
        self.calls.lock().unwrap().push(request.clone());
        Ok(Response::new(ReceiverStream::new((self.script)(request)?)))
    }

    async fn get_bundle(
        &self,
        _: Request<GetBundleRequest>,
    ) -> Result<Response<Self::GetBundleStream>, Status> {
        let chunks = self.bundle.clone().into_iter().flat_map(|(file, data)| {
            let chunks: Vec<Vec<u8>> = data.chunks(4096).map(<[u8]>::to_vec).collect();
            chunks.into_iter().enumerate().map(move |(index, data)| {
                let file = if index == 0 { file.clone() } else { String::new() };
                Ok(BundleChunk { file, data: data.into() })
            })
        });
        Ok(Response::new(Box::pin(futures::stream::iter(chunks.collect::<Vec<_>>()))))
    }

    async fn set_role(&self, _: Request<SetRoleRequest>) -> Result<Response<SetRoleResponse>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn attach(&self, _: Request<AttachRequest>) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn prefill(&self, _: Request<PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn reserve(&self, _: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        Err(Status::unimplemented("scripted"))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unimplemented("scripted"))
    }
}

pub(crate) fn started() -> DecodeEvent {
    DecodeEvent { event: Some(decode_event::Event::Started(Started::default())) }
}

/// Tokens with log probability `-position - 1` and as many alternatives as asked for.
pub(crate) fn tokens(position: u32, ids: &[u32], top: u32) -> DecodeEvent {
    let tokens = ids
        .iter()
        .zip(position..)
        .map(|(&id, position)| Token {
            id,
            logprob: -(position as f32) - 1.0,
            top: (0..top).map(|k| TopLogprob { id: 64 + k, logprob: -(k as f32) - 0.5 }).collect(),
        })
        .collect();
    DecodeEvent { event: Some(decode_event::Event::Tokens(Tokens { position, tokens })) }
}

pub(crate) fn finished(reason: finished::Reason, cached_tokens: u32) -> DecodeEvent {
    DecodeEvent {
        event: Some(decode_event::Event::Finished(Finished { reason: reason.into(), cached_tokens })),
    }
}

/// A stream that says all this at once.
pub(crate) fn all(events: impl IntoIterator<Item = Result<DecodeEvent, Status>>) -> Events {
    let events: Vec<_> = events.into_iter().collect();
    let (sender, receiver) = mpsc::channel(events.len().max(1));
    for event in events {
        sender.try_send(event).unwrap();
    }
    receiver
}

/// Says `text`, a token an event, then ends as a model does: with its end-of-sequence token, or at `max_tokens`.
pub(crate) fn says(
    text: &'static str,
) -> impl Fn(DecodeRequest) -> Result<Events, Status> + Send + Sync + 'static {
    let model = text_model();
    move |request: DecodeRequest| {
        let sampling = request.sampling.unwrap();
        let mut ids = model.encode(text, false).unwrap();
        ids.extend(sampling.stop_token_ids.first());
        let whole = ids.len() <= sampling.max_tokens as usize && !sampling.stop_token_ids.is_empty();
        ids.truncate(sampling.max_tokens as usize);
        let reason = if whole { finished::Reason::Stop } else { finished::Reason::Length };
        let top = sampling.top_logprobs.unwrap_or(0);
        let said = ids.iter().zip(0..).map(|(&id, position)| Ok(tokens(position, &[id], top)));
        Ok(all([Ok(started())].into_iter().chain(said).chain([Ok(finished(reason, 0))])))
    }
}
