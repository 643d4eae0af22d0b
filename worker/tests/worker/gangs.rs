//! Gangs on the fake backend and what a gateway says to them.

use std::net::SocketAddr;
use std::time::Duration;

use herd_engine::{FakeControl, FakeOptions};
use herd_proto::internal::v1::decode_event::Event;
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{Context, DecodeEvent, DecodeRequest, Load, Sampling, WatchRequest};
use herd_worker::{Backend, FakeBackend, Worker, WorkerOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

pub(crate) const CONTEXT: usize = 2048;

/// Much longer than anything here takes, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(25);

/// Fails the test rather than hang.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("this should have come to an end")
}

/// Six KV heads, so that tensor 1, 2, 3 and 6 split them and 12 holds each twice; rows of 8 bytes.
pub(crate) fn fake(tensor: usize) -> FakeOptions {
    FakeOptions { tensor, kv_heads: 6, row_bytes: 8, kv_blocks: 64, ..FakeOptions::default() }
}

/// A gang and its leader's client.
pub(crate) struct Gang {
    pub(crate) worker: Worker,
    pub(crate) client: WorkerClient<Channel>,
    pub(crate) control: FakeControl,
}

impl Gang {
    pub(crate) async fn start(options: FakeOptions) -> Self {
        Self::start_with(options, |_| {}).await
    }

    pub(crate) async fn start_with(options: FakeOptions, change: impl FnOnce(&mut WorkerOptions)) -> Self {
        let backend = FakeBackend::new(options, CONTEXT);
        let control = backend.control();
        let mut options = WorkerOptions::loopback(Backend::Fake(Box::new(backend)));
        change(&mut options);
        let worker = Worker::start(options).await.unwrap();
        let client = WorkerClient::connect(format!("http://{}", worker.endpoint())).await.unwrap();
        Self { worker, client, control }
    }

    pub(crate) fn address(&self) -> String {
        self.worker.endpoint().to_string()
    }

    pub(crate) async fn decode(&self, request: DecodeRequest) -> Result<Streaming<DecodeEvent>, Status> {
        Ok(self.client.clone().decode(request).await?.into_inner())
    }

    /// A whole choice.
    pub(crate) async fn answer(&self, request: DecodeRequest) -> Result<Answer, Status> {
        Answer::read(&mut self.decode(request).await?).await
    }

    /// Waits until a step is held.
    pub(crate) async fn held(&self) {
        soon(self.control.held()).await;
    }

    /// Lets one held step go.
    pub(crate) async fn pass(&self) {
        soon(self.control.pass()).await;
    }

    /// Waits until nothing runs, waits or holds a block.
    pub(crate) async fn idle(&self) {
        soon(self.becomes_idle()).await;
    }

    async fn becomes_idle(&self) {
        let mut events = self.client.clone().watch(WatchRequest {}).await.unwrap().into_inner();
        loop {
            let load = events.message().await.unwrap().unwrap().load.unwrap();
            if load == Load::default() && self.metric("herd_kv_transfers_open").await == 0 {
                return;
            }
        }
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        get(self.worker.http(), path).await
    }

    /// A sample's value, by its name and labels as they are printed.
    pub(crate) async fn metric(&self, sample: &str) -> u64 {
        metric(self.worker.http(), sample).await
    }

    pub(crate) async fn rejected(&self, reason: &str) -> u64 {
        self.metric(&format!("herd_kv_frames_rejected_total{{reason=\"{reason}\"}}")).await
    }
}

pub(crate) async fn get(http: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(http).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

pub(crate) async fn metric(http: SocketAddr, sample: &str) -> u64 {
    let (_, page) = get(http, "/metrics").await;
    let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{sample} is not in\n{page}")).parse().unwrap()
}

/// Everything a choice's stream said.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) started: bool,
    pub(crate) ids: Vec<u32>,
    /// Bits of every log probability, the token's and the alternatives'.
    pub(crate) logprobs: Vec<Vec<(u32, u32)>>,
    pub(crate) finished: Option<i32>,
}

impl Answer {
    pub(crate) async fn read(events: &mut Streaming<DecodeEvent>) -> Result<Self, Status> {
        Self::read_from(events, 0).await
    }

    /// Of a choice that goes on at a position.
    pub(crate) async fn read_from(events: &mut Streaming<DecodeEvent>, first: usize) -> Result<Self, Status> {
        let mut answer = Self::default();
        while let Some(event) = soon(events.message()).await? {
            assert_eq!(answer.finished, None, "nothing comes after the end");
            match event.event.unwrap() {
                Event::Started(_) => answer.started = true,
                Event::Prompt(_) => {}
                Event::Tokens(tokens) => {
                    assert_eq!(tokens.position as usize, first + answer.ids.len());
                    for token in tokens.tokens {
                        answer.ids.push(token.id);
                        let own = (token.id, token.logprob.to_bits());
                        let top = token.top.iter().map(|top| (top.id, top.logprob.to_bits()));
                        answer.logprobs.push([own].into_iter().chain(top).collect());
                    }
                }
                Event::Finished(finished) => answer.finished = Some(finished.reason),
            }
        }
        assert!(answer.finished.is_some(), "a stream without an end");
        Ok(answer)
    }
}

pub(crate) fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|at| (at * 7919 + 13) % 1000).collect()
}

/// Greedy, with three alternatives a token.
pub(crate) fn request(prompt: Vec<u32>, max_tokens: u32) -> DecodeRequest {
    DecodeRequest {
        context: Some(Context { request_id: "test".to_owned(), ..Context::default() }),
        prompt,
        sampling: Some(Sampling {
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            seed: 5,
            stop_token_ids: Vec::new(),
            top_logprobs: Some(3),
            first_position: 0,
            shaping: None,
            grammar: None,
            prompt_logprobs: None,
        }),
        prefill_peer: String::new(),
        prefill_epoch: 0,
    }
}

/// The same with the prompt computed elsewhere.
pub(crate) fn split(prefill: &Gang, request: DecodeRequest) -> DecodeRequest {
    DecodeRequest { prefill_peer: prefill.address(), ..request }
}
