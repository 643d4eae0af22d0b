//! Asks a served model a question.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::progress;
use crate::stream::{self, Stream};

/// Where the gateway is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gateway {
    /// OpenAI.
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
}

/// How long the gateway has to find a model that is ready.
const FOUND: Duration = Duration::from_mins(1);
const EXCHANGE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// How long an answer may take.
const ANSWER: Duration = Duration::from_mins(2);

/// Waits until the gateway serves a model of this name.
pub(crate) fn await_model(gateway: Gateway, model: &str) -> Result<()> {
    progress::step("gateway", |_| {
        let began = Instant::now();
        loop {
            let last = match models(gateway.http) {
                Ok(answer) if serves(&answer, model) => return Ok(((), format!("serves {model}"))),
                Ok(answer) => answer,
                Err(error) => format!("{error:#}"),
            };
            if began.elapsed() > FOUND {
                bail!("the gateway at {} does not serve {model}: {}", gateway.http, last.trim());
            }
            thread::sleep(PAUSE);
        }
    })
}

fn models(address: SocketAddr) -> Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&address, EXCHANGE).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(EXCHANGE))?;
    stream.set_write_timeout(Some(EXCHANGE))?;
    write!(stream, "GET /v1/models HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(1 << 20).read_to_string(&mut answer).with_context(|| format!("read from {address}"))?;
    Ok(answer)
}

/// Whether the answer to GET /v1/models lists the model.
fn serves(answer: &str, model: &str) -> bool {
    let ok = answer.lines().next().is_some_and(|line| line.split(' ').nth(1) == Some("200"));
    let Some((_, body)) = answer.split_once("\r\n\r\n") else { return false };
    let Ok(body) = serde_json::from_str::<serde_json::Value>(body) else { return false };
    ok && body["data"].as_array().is_some_and(|models| models.iter().any(|listed| listed["id"] == model))
}

/// Asks over gRPC and prints the answer as it comes.
pub(crate) fn ask(herd: &Path, gateway: Gateway, model: &str, question: &str) -> Result<()> {
    let mut chat = Command::new(herd);
    chat.args(["chat", "--grpc", &gateway.grpc.to_string(), "--model", model]);
    chat.args(["--temperature", "0", "--max-tokens", "128"]).stdin(Stdio::piped());
    let mut answer = Stream::start(chat, ANSWER, stream::bytes)?;
    let mut input = answer.input().context("herd chat has no input")?;
    writeln!(input, "{question}")?;
    drop(input);
    let mut out = std::io::stdout().lock();
    let mut said = Vec::new();
    while let Some(piece) = answer.next().context("no whole answer")? {
        out.write_all(&piece)?;
        out.flush()?;
        said.extend(piece);
    }
    let status = answer.ended()?;
    ensure!(status.success(), "herd chat ended with {status}");
    ensure!(!said.trim_ascii().is_empty(), "the answer is empty");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_served_once_it_is_listed() {
        let answer = |status: &str, body: &str| {
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n\r\n{body}")
        };
        let listed = r#"{"object": "list", "data": [{"id": "smollm2", "object": "model"}]}"#;
        assert!(serves(&answer("200 OK", listed), "smollm2"));
        assert!(!serves(&answer("200 OK", listed), "smollm"));
        assert!(!serves(&answer("200 OK", r#"{"object": "list", "data": []}"#), "smollm2"));
        assert!(!serves(&answer("503 Service Unavailable", listed), "smollm2"));
        assert!(!serves("", "smollm2"));
    }
}
