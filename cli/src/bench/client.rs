//! One streamed completion, with the times at which its parts came.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, BodyStream, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::server_url::ServerUrl;

const CONNECT: Duration = Duration::from_secs(10);
const MAX_BYTES: usize = 16 << 20;

/// Where requests go.
pub(crate) struct Target(ServerUrl);

/// One request.
pub(super) struct Ask<'a> {
    pub(super) model: &'a str,
    pub(super) prompt: &'a [u32],
    pub(super) max_tokens: u32,
    /// When it should be sent: times count from here.
    pub(super) due: Instant,
}

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answer {
    /// Its kind, of few.
    pub(super) error: Option<String>,
    pub(super) first_token: Option<Duration>,
    pub(super) whole: Duration,
    /// Between parts of the answer.
    pub(super) gaps: Vec<Duration>,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
}

impl Answer {
    pub(super) fn failed(kind: impl Into<String>) -> Self {
        Self { error: Some(kind.into()), ..Self::default() }
    }
}

impl Target {
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        ServerUrl::parse(url).map(Self)
    }

    pub(super) async fn first_model(&self) -> anyhow::Result<String> {
        let (status, body) = self.get("/v1/models").await?;
        let list: Value = serde_json::from_slice(&body).with_context(|| format!("/v1/models: {status}"))?;
        let first = list["data"][0]["id"].as_str();
        Ok(first.context("the server has no model")?.to_owned())
    }

    /// A whole answer.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.send(Method::GET, path, Vec::new()).await;
        let response = response.map_err(|kind| anyhow::anyhow!("{}: {kind}", self.0.authority))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        Ok((status, body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes()))
    }

    pub(super) async fn ask(&self, ask: Ask<'_>) -> Answer {
        let due = ask.due;
        let mut answer = match self.stream(ask).await {
            Ok(answer) => answer,
            Err(kind) => Answer::failed(kind),
        };
        answer.whole = due.elapsed();
        answer
    }

    async fn stream(&self, ask: Ask<'_>) -> Result<Answer, String> {
        let Ask { model, prompt, max_tokens, due } = ask;
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let response = self.send(Method::POST, "/v1/completions", body.to_string().into_bytes()).await?;
        if !response.status().is_success() {
            return Err(format!("status {}", response.status().as_u16()));
        }
        let mut frames = BodyStream::new(response.into_body());
        let mut answer = Answer::default();
        let mut last = None;
        let mut buffer = Vec::new();
        while let Some(frame) = frames.next().await {
            let data = frame.map_err(|_| "broken stream")?.into_data().unwrap_or_default();
            buffer.extend_from_slice(&data);
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data:") else { continue };
                let data = data.trim_ascii();
                if data == b"[DONE]" {
                    return Ok(answer);
                }
                let event: Value = serde_json::from_slice(data).map_err(|_| "no JSON in the stream")?;
                if event.get("error").is_some() {
                    return Err("error in the stream".to_owned());
                }
                if event["choices"][0]["text"].is_string() && event["choices"][0]["finish_reason"].is_null() {
                    let now = Instant::now();
                    answer.first_token.get_or_insert_with(|| now.duration_since(due));
                    answer.gaps.extend(last.replace(now).map(|last| now.duration_since(last)));
                }
                let usage = |field: &str| event["usage"][field].as_u64();
                answer.prompt_tokens = usage("prompt_tokens").unwrap_or(answer.prompt_tokens);
                answer.output_tokens = usage("completion_tokens").unwrap_or(answer.output_tokens);
            }
            if buffer.len() > MAX_BYTES {
                return Err("no line in the stream".to_owned());
            }
        }
        Err("broken stream".to_owned())
    }

    /// A connection a request, as independent clients have. An error is its kind.
    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Response<Incoming>, String> {
        let connected = timeout(CONNECT, TcpStream::connect(&self.0.authority)).await;
        let stream = connected.ok().and_then(Result::ok).ok_or("no connection")?;
        stream.set_nodelay(true).map_err(|_| "no connection")?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|_| "no connection")?;
        tokio::spawn(connection);
        let request = self.0.request(method, path, body).map_err(|_| "bad address")?;
        sender.send_request(request).await.map_err(|_| "connection closed".to_owned())
    }
}
