//! An HTTP server that answers one request a connection, byte for byte as it is told to.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Of a file that is served whole.
pub(crate) type Bytes = Arc<Vec<u8>>;

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// As it was sent, with the query.
    pub(crate) target: String,
    /// Names in lower case.
    pub(crate) headers: HashMap<String, String>,
}

impl Request {
    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        let query = self.target.split_once('?')?.1;
        query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// First byte of `Range: bytes=N-`.
    pub(crate) fn from(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

/// What happens to the body of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Whole,
    /// The connection ends after so many bytes.
    Cut(usize),
    /// Nothing comes after so many bytes.
    Stall(usize),
}

#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Bytes,
    /// Where in it the answer begins.
    pub(crate) from: usize,
    pub(crate) end: End,
}

impl Response {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: Arc::new(body.into()), from: 0, end: End::Whole }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// A file, or the part of it that was asked for.
    pub(crate) fn file(body: Bytes, request: &Request) -> Self {
        let size = body.len();
        let response = |status, from| Self { status, headers: Vec::new(), body, from, end: End::Whole };
        match request.from() {
            None => response(200, 0),
            Some(from) if from >= size => Self::new(416, "").with("content-range", format!("bytes */{size}")),
            Some(from) => {
                response(206, from).with("content-range", format!("bytes {from}-{}/{size}", size - 1))
            }
        }
    }
}

/// Dropped, it closes every connection.
pub(crate) struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    _task: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start(handler: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        Self::listen("127.0.0.1:0", handler).await
    }

    pub(crate) async fn listen(
        address: &str,
        handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, handler) = (Arc::<Mutex<Vec<Request>>>::default(), Arc::new(handler));
        let mut task = JoinSet::new();
        let sees = Arc::clone(&seen);
        task.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                let (seen, handler) = (Arc::clone(&sees), Arc::clone(&handler));
                // A client that goes away is no failure.
                open.spawn(async move { drop(answer(connection, &seen, &*handler).await) });
                while open.try_join_next().is_some() {}
            }
        });
        Self { address, seen, _task: task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests so far.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// Those for a path that ends so.
    pub(crate) fn asked_for(&self, end: &str) -> Vec<Request> {
        self.seen().into_iter().filter(|request| request.path().ends_with(end)).collect()
    }
}

async fn answer(
    mut connection: TcpStream,
    seen: &Mutex<Vec<Request>>,
    handler: &(dyn Fn(&Request) -> Response + Send + Sync),
) -> std::io::Result<()> {
    let mut lines = BufReader::new(&mut connection).lines();
    let first = lines.next_line().await?.unwrap_or_default();
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (method, target) = (method.to_owned(), target.to_owned());
    let mut headers = HashMap::new();
    while let Some(line) = lines.next_line().await?.filter(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let request = Request { method, target, headers };
    seen.lock().unwrap().push(request.clone());
    let Response { status, headers, body, from, end } = handler(&request);
    let body = &body[from..];
    let mut head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    connection.write_all(format!("{head}\r\n").as_bytes()).await?;
    if request.method == "HEAD" {
        return Ok(());
    }
    let sent = match end {
        End::Whole => body.len(),
        End::Cut(after) | End::Stall(after) => after.min(body.len()),
    };
    connection.write_all(&body[..sent]).await?;
    connection.flush().await?;
    if matches!(end, End::Stall(_)) {
        std::future::pending::<()>().await;
    }
    connection.shutdown().await
}
