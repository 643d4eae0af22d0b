//! A prefill leader in the hands of a test.

use futures::stream::Pending;
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::prefill_event::Event;
use herd_proto::internal::v1::worker_server::{Worker, WorkerServer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::gangs::soon;

type Events = mpsc::Sender<Result<wire::PrefillEvent, Status>>;

/// Takes every `Prefill` and does what the test does.
pub(crate) struct Stub {
    pub(crate) address: String,
    calls: mpsc::Receiver<Call>,
    _task: JoinSet<()>,
}

/// One `Prefill` call.
pub(crate) struct Call {
    pub(crate) request: wire::PrefillRequest,
    events: Events,
}

impl Call {
    pub(crate) async fn send(&self, event: Event) {
        self.events.send(Ok(wire::PrefillEvent { event: Some(event) })).await.unwrap();
    }

    /// Resolves when the decode gang has dropped the stream.
    pub(crate) async fn dropped(&self) {
        soon(self.events.closed()).await;
    }

    pub(crate) fn reserve(&self, prompt_tokens: u32) -> wire::ReserveRequest {
        let context = wire::Context { gang_epoch: self.request.decode_epoch, ..wire::Context::default() };
        wire::ReserveRequest { context: Some(context), transfer: self.request.transfer, prompt_tokens }
    }

    pub(crate) fn renew(&self) -> wire::RenewRequest {
        wire::RenewRequest { context: None, transfer: self.request.transfer }
    }
}

impl Stub {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, calls) = mpsc::channel(4);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(WorkerServer::new(Calls(sender)));
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self { address, calls, _task: task }
    }

    pub(crate) async fn call(&mut self) -> Call {
        soon(self.calls.recv()).await.unwrap()
    }
}

struct Calls(mpsc::Sender<Call>);

fn not_here<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("a stub"))
}

#[tonic::async_trait]
impl Worker for Calls {
    type WatchStream = Pending<Result<wire::WatchEvent, Status>>;
    type DecodeStream = Streaming<wire::DecodeEvent>;
    type AttachStream = Streaming<wire::DecodeEvent>;
    type PrefillStream = ReceiverStream<Result<wire::PrefillEvent, Status>>;
    type GetBundleStream = Pending<Result<wire::BundleChunk, Status>>;

    async fn prefill(
        &self,
        request: Request<wire::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let (events, stream) = mpsc::channel(4);
        let call = Call { request: request.into_inner(), events };
        self.0.send(call).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn describe(
        &self,
        _: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeResponse>, Status> {
        not_here()
    }

    async fn set_role(
        &self,
        _: Request<wire::SetRoleRequest>,
    ) -> Result<Response<wire::SetRoleResponse>, Status> {
        not_here()
    }

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        not_here()
    }

    async fn decode(&self, _: Request<wire::DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        not_here()
    }

    async fn attach(&self, _: Request<wire::AttachRequest>) -> Result<Response<Self::AttachStream>, Status> {
        not_here()
    }

    async fn reserve(
        &self,
        _: Request<wire::ReserveRequest>,
    ) -> Result<Response<wire::ReserveResponse>, Status> {
        not_here()
    }

    async fn renew(&self, _: Request<wire::RenewRequest>) -> Result<Response<wire::RenewResponse>, Status> {
        not_here()
    }

    async fn drain(&self, _: Request<wire::DrainRequest>) -> Result<Response<wire::DrainResponse>, Status> {
        not_here()
    }

    async fn get_bundle(
        &self,
        _: Request<wire::GetBundleRequest>,
    ) -> Result<Response<Self::GetBundleStream>, Status> {
        not_here()
    }
}
