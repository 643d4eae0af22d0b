//! An OpenAI server over plain HTTP.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, BodyStream};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Ask, Pieces};
use crate::server_url::ServerUrl;

const CONNECT: Duration = Duration::from_secs(10);
/// Of an answer that is not streamed, or of one line of one that is.
const MAX_BYTES: usize = 16 << 20;

pub(crate) struct HttpClient(ServerUrl);

impl HttpClient {
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        ServerUrl::parse(url).map(Self)
    }

    pub(crate) async fn models(&self) -> anyhow::Result<Vec<String>> {
        let response = self.send(Method::GET, "/v1/models", Vec::new()).await?;
        let list: Value =
            serde_json::from_slice(&whole(response).await?).context("the list of models is no JSON")?;
        let models = list["data"].as_array().context("the list of models has no data")?;
        Ok(models.iter().filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    pub(crate) async fn answer(&self, ask: Ask<'_>) -> anyhow::Result<Pieces> {
        let Ask { model, turns, temperature, max_tokens } = ask;
        let messages: Vec<Value> =
            turns.iter().map(|turn| json!({"role": turn.role, "content": turn.content})).collect();
        let mut body =
            json!({"model": model, "messages": messages, "temperature": temperature, "stream": true});
        if let Some(max_tokens) = max_tokens {
            body["max_tokens"] = max_tokens.into();
        }
        let response = self.send(Method::POST, "/v1/chat/completions", serde_json::to_vec(&body)?).await?;
        let state = (BodyStream::new(response.into_body()), Vec::new(), false);
        Ok(Box::pin(futures::stream::unfold(state, |(mut frames, mut buffer, done)| async move {
            if done {
                return None;
            }
            let next = loop {
                match take_event(&mut buffer) {
                    Some(Ok(Said::Nothing)) => {}
                    Some(Ok(Said::Done)) => return None,
                    Some(Ok(Said::Text(text))) => break Ok(text),
                    Some(Err(error)) => break Err(error),
                    None => match frames.next().await {
                        Some(Ok(frame)) => buffer.extend_from_slice(&frame.into_data().unwrap_or_default()),
                        Some(Err(error)) => break Err(error.into()),
                        None => break Err(anyhow::anyhow!("the answer broke off")),
                    },
                }
                if buffer.len() > MAX_BYTES {
                    break Err(anyhow::anyhow!("the server sent a line of more than {MAX_BYTES} bytes"));
                }
            };
            let failed = next.is_err();
            Some((next, (frames, buffer, failed)))
        })))
    }

    /// A connection a request: it is dropped with the answer, which tells the server to stop.
    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Response<Incoming>> {
        let nobody = || format!("no server at {}", self.0.authority);
        let stream = timeout(CONNECT, TcpStream::connect(&self.0.authority)).await.with_context(nobody)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream.with_context(nobody)?)).await?;
        tokio::spawn(connection);
        let request = self.0.request(method, path, body)?;
        let response = sender.send_request(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = serde_json::from_slice(&whole(response).await?).unwrap_or_default();
        match body["error"]["message"].as_str() {
            Some(message) => bail!("{message}"),
            None => bail!("the server answered {status}"),
        }
    }
}

async fn whole(response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let limited = http_body_util::Limited::new(response.into_body(), MAX_BYTES);
    let collected =
        limited.collect().await.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?;
    Ok(collected.to_bytes())
}

#[derive(Debug, PartialEq)]
enum Said {
    Text(String),
    Nothing,
    Done,
}

/// Takes one line of the stream, if it is whole.
fn take_event(buffer: &mut Vec<u8>) -> Option<anyhow::Result<Said>> {
    let end = buffer.iter().position(|&byte| byte == b'\n')?;
    let line: Vec<u8> = buffer.drain(..=end).collect();
    let Some(data) = line.strip_prefix(b"data:") else { return Some(Ok(Said::Nothing)) };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Some(Ok(Said::Done));
    }
    let event: Value = match serde_json::from_slice(data) {
        Ok(event) => event,
        Err(error) => return Some(Err(anyhow::anyhow!("the server sent no JSON: {error}"))),
    };
    if let Some(message) = event["error"]["message"].as_str() {
        return Some(Err(anyhow::anyhow!("{message}")));
    }
    Some(Ok(match event["choices"][0]["delta"]["content"].as_str() {
        Some(text) if !text.is_empty() => Said::Text(text.to_owned()),
        _ => Said::Nothing,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_taken_however_they_are_cut() {
        let stream = b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n: note\n\ndata:{\"choices\":[]}\n\ndata: [DONE]\n\n";
        for size in 1..stream.len() {
            let (mut buffer, mut said) = (Vec::new(), Vec::new());
            for part in stream.chunks(size) {
                buffer.extend_from_slice(part);
                while let Some(event) = take_event(&mut buffer) {
                    said.push(event.unwrap());
                }
            }
            said.retain(|said| *said != Said::Nothing);
            assert_eq!(said, [Said::Text("a".to_owned()), Said::Done], "in parts of {size}");
        }
    }

    #[test]
    fn an_error_in_the_stream_is_one() {
        let mut buffer = b"data: {\"error\":{\"message\":\"it broke\"}}\n\n".to_vec();
        assert_eq!(take_event(&mut buffer).unwrap().unwrap_err().to_string(), "it broke");
    }
}
