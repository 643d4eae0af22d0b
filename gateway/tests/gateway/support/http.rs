//! As little of an HTTP client as the tests need, with the connection in the test's hands.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::soon;

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The data of each server-sent event.
    pub(crate) fn events(&self) -> Vec<String> {
        let text = self.text();
        assert!(text.is_empty() || text.ends_with("\n\n"), "{text:?}");
        text.split_terminator("\n\n")
            .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")).to_owned())
            .collect()
    }

    /// The chunks of a stream that ended well.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// The error's field and message, of a refusal with this status.
    #[track_caller]
    pub(crate) fn refusal(&self, status: u16) -> (Value, String) {
        assert_eq!(self.status, status, "{}", self.text());
        let error = &self.json()["error"];
        assert!(error["type"].is_string());
        (error["param"].clone(), error["message"].as_str().unwrap().to_owned())
    }
}

/// An answer being read.
pub(crate) struct Reading {
    reader: BufReader<TcpStream>,
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
}

/// Sends a request and gives the connection.
pub(crate) async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> BufReader<TcpStream> {
    let mut stream = soon(TcpStream::connect(address)).await.unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    if !body.is_empty() {
        head.push_str("content-type: application/json\r\ncontent-length: ");
        head.push_str(&body.len().to_string());
        head.push_str("\r\n");
    }
    for (name, value) in headers {
        head.extend([*name, ": ", *value, "\r\n"]);
    }
    head += "\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    // A refusal may come before the body is read.
    let _ = stream.write_all(body).await;
    BufReader::new(stream)
}

/// Reads the head of the answer.
pub(crate) async fn head(mut reader: BufReader<TcpStream>) -> Reading {
    let mut line = String::new();
    soon(reader.read_line(&mut line)).await.unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {line:?}")).parse().unwrap();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        soon(reader.read_line(&mut line)).await.unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_owned(), value.to_owned()),
            None => return Reading { reader, status, headers },
        };
    }
}

impl Reading {
    fn chunked(&self) -> bool {
        self.headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked")
    }

    /// The next chunk of a chunked body; empty at its end.
    pub(crate) async fn chunk(&mut self) -> Vec<u8> {
        assert!(self.chunked());
        let mut line = String::new();
        soon(self.reader.read_line(&mut line)).await.unwrap();
        let length = usize::from_str_radix(line.trim_end(), 16).unwrap_or_else(|_| panic!("{line:?}"));
        let mut chunk = vec![0; length + 2];
        soon(self.reader.read_exact(&mut chunk)).await.unwrap();
        chunk.truncate(length);
        chunk
    }

    /// The rest.
    pub(crate) async fn rest(mut self) -> Answer {
        let mut body = Vec::new();
        if self.chunked() {
            loop {
                match self.chunk().await {
                    chunk if chunk.is_empty() => break,
                    chunk => body.extend(chunk),
                }
            }
        } else if let Some(length) = self.headers.get("content-length") {
            body = vec![0; length.parse().unwrap()];
            soon(self.reader.read_exact(&mut body)).await.unwrap();
        }
        Answer { status: self.status, headers: self.headers, body }
    }
}

pub(crate) async fn post(address: SocketAddr, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    head(send(address, "POST", path, headers, body).await).await.rest().await
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Answer {
    head(send(address, "GET", path, &[], &[]).await).await.rest().await
}
