//! A registry in this process, which can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use sha2::{Digest as _, Sha256};

/// What it does to clients.
#[derive(Debug, Clone, Default)]
pub(super) struct Manners {
    /// Wants a password.
    pub(super) basic: Option<String>,
    /// Wants a token, which is given for this `Authorization`.
    pub(super) bearer: Option<String>,
    /// A token is good for so many requests; 0: for all.
    pub(super) token_lasts: usize,
    /// So many uploads are cut in the middle.
    pub(super) cuts: usize,
    /// So many uploads are answered with this status.
    pub(super) refusals: usize,
    pub(super) refuses_with: u16,
    /// Claims to have stored something else.
    pub(super) lies: bool,
    /// Takes a blob from another repository.
    pub(super) mounts: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) manners: Manners,
    /// `REPOSITORY DIGEST`
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    /// `REPOSITORY TAG`
    pub(super) manifests: BTreeMap<String, Vec<u8>>,
    /// `METHOD TARGET`, with the query.
    pub(super) requests: Vec<String>,
    tokens: usize,
    left: usize,
}

impl State {
    pub(super) fn count(&self, start: &str) -> usize {
        self.requests.iter().filter(|request| request.starts_with(start)).count()
    }
}

/// The registry; it ends when dropped.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    state: Arc<Mutex<State>>,
    ends: Arc<AtomicBool>,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(manners: Manners) -> Self {
        Self::listen("127.0.0.1:0", manners, None)
    }

    /// One with TLS, at an address that is not taken for one without.
    pub(super) fn start_with_tls(config: Arc<ServerConfig>) -> Self {
        Self::listen("127.0.0.2:0", Manners::default(), Some(config))
    }

    fn listen(address: &str, manners: Manners, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let state = Arc::new(Mutex::new(State { manners, ..State::default() }));
        let (shared, ending) = (state.clone(), ends.clone());
        let accepting = thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if ending.load(Ordering::Acquire) {
                    return;
                }
                // The client will say what it thinks of an error.
                let _ = match tls.clone() {
                    None => serve(stream, address, &shared),
                    Some(config) => {
                        let connection = ServerConnection::new(config).unwrap();
                        serve(StreamOwned::new(connection, stream), address, &shared)
                    }
                };
            }
        });
        Self { address, state, ends, accepting: Some(accepting) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        // Wakes it.
        drop(TcpStream::connect(self.address));
        let _ = self.accepting.take().map(thread::JoinHandle::join);
    }
}

/// One request of a connection.
fn serve(stream: impl io::Read + io::Write, address: SocketAddr, state: &Mutex<State>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        let named = |line: &&String| line.to_ascii_lowercase().starts_with(&format!("{name}:"));
        head.iter().find(named).map(|line| line[name.len() + 1..].trim().to_owned())
    };
    let length: u64 = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut words = head[0].split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut state = state.lock().unwrap();
    state.requests.push(format!("{method} {target}"));
    let upload = method == "PUT" && target.contains("/uploads/");
    if upload && state.manners.cuts > 0 {
        state.manners.cuts -= 1;
        return reader.read_exact(&mut vec![0; length as usize / 2]);
    }
    let mut body = Vec::new();
    reader.by_ref().take(length).read_to_end(&mut body)?;
    let answer = if upload && state.manners.refusals > 0 {
        state.manners.refusals -= 1;
        (state.manners.refuses_with, Vec::new())
    } else {
        state.answer(method, target, header("authorization").as_deref(), &body, address)
    };
    write_answer(reader.get_mut(), answer, method == "HEAD")
}

type Reply = (u16, Vec<(&'static str, String)>);

fn write_answer(stream: &mut impl io::Write, (status, mut headers): Reply, bare: bool) -> io::Result<()> {
    let body = headers.iter().position(|(name, _)| name.is_empty()).map(|at| headers.remove(at).1);
    let body = body.unwrap_or_default();
    let mut text = format!("HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.extend([name, ": ", &value, "\r\n"]);
    }
    text += "\r\n";
    if !bare {
        text += &body;
    }
    stream.write_all(text.as_bytes())?;
    stream.flush()
}

impl State {
    /// A header without a name is the body.
    fn answer(
        &mut self,
        method: &str,
        target: &str,
        authorization: Option<&str>,
        body: &[u8],
        address: SocketAddr,
    ) -> Reply {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        if path == "/token" {
            if self.manners.bearer.as_deref() != Some(authorization.unwrap_or_default()) {
                return (401, Vec::new());
            }
            self.tokens += 1;
            self.left = self.manners.token_lasts;
            return (200, vec![("", format!(r#"{{"token": "t{}"}}"#, self.tokens))]);
        }
        if self.manners.bearer.is_some() {
            let good = authorization == Some(&format!("Bearer t{}", self.tokens));
            let lasts = self.manners.token_lasts == 0 || self.left > 0;
            if !good || !lasts {
                let challenge = format!(r#"Bearer realm="http://{address}/token",service="tests""#);
                return (401, vec![("www-authenticate", challenge)]);
            }
            self.left = self.left.saturating_sub(1);
        }
        if self.manners.basic.as_deref().is_some_and(|basic| authorization != Some(basic)) {
            return (401, vec![("www-authenticate", r#"Basic realm="tests""#.to_owned())]);
        }
        self.registry(method, path.trim_start_matches("/v2/"), query, body)
    }

    fn registry(&mut self, method: &str, path: &str, query: &str, body: &[u8]) -> Reply {
        let value = |name: &str| {
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            let found = pairs.into_iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.replace("%3A", ":").replace("%2F", "/"))
        };
        let stored = |digest: &str| vec![("docker-content-digest", digest.to_owned())];
        if let Some((repository, tag)) = path.split_once("/manifests/") {
            let key = format!("{repository} {tag}");
            if method == "HEAD" {
                return self.manifests.get(&key).map_or((404, Vec::new()), |text| (200, stored(&sum(text))));
            }
            self.manifests.insert(key, body.to_vec());
            return (201, stored(&sum(body)));
        }
        if let Some((repository, rest)) = path.split_once("/blobs/uploads/") {
            if method == "POST" {
                let from = value("mount")
                    .zip(value("from"))
                    .map(|(digest, from)| (format!("{from} {digest}"), digest));
                if let Some((source, digest)) = from.filter(|_| self.manners.mounts)
                    && let Some(blob) = self.blobs.get(&source).cloned()
                {
                    self.blobs.insert(format!("{repository} {digest}"), blob);
                    return (201, stored(&digest));
                }
                return (202, vec![("location", format!("/v2/{repository}/blobs/uploads/7?_state=secret"))]);
            }
            assert!(rest == "7" && value("_state").is_some(), "{query}");
            let digest = value("digest").unwrap();
            if digest != sum(body) {
                return (400, vec![("", r#"{"errors":[{"code":"DIGEST_INVALID"}]}"#.to_owned())]);
            }
            self.blobs.insert(format!("{repository} {digest}"), body.to_vec());
            return (201, stored(if self.manners.lies { "sha256:other" } else { &digest }));
        }
        let (repository, digest) = path.split_once("/blobs/").unwrap();
        (if self.blobs.contains_key(&format!("{repository} {digest}")) { 200 } else { 404 }, Vec::new())
    }
}

fn sum(content: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(content))
}
