//! A hub: the API and small files on one host, large files on another, as the real one has it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::server::{Bytes, End, Request, Response, Server};

/// A file of a commit.
#[derive(Clone)]
pub(crate) struct HubFile {
    pub(crate) bytes: Bytes,
    /// As the hub lists it: of git for a small file, SHA-256 for a large one.
    pub(crate) oid: String,
    /// Served by the other host.
    pub(crate) is_large: bool,
}

/// What happens to one answer that has bytes of a file.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    None,
    End(End),
    /// Another status, and a pause that is asked for.
    Status(u16, Option<u64>),
    /// A byte of the file is another one.
    Flip(usize),
    /// The range that was asked for is not looked at.
    NoRanges,
    /// The file is shorter than it is listed.
    Short(usize),
}

pub(crate) type Before = Box<dyn Fn(&str) + Send>;

#[derive(Default)]
pub(crate) struct State {
    /// By commit.
    pub(crate) commits: BTreeMap<String, BTreeMap<String, HubFile>>,
    pub(crate) branches: HashMap<String, String>,
    /// Needed for everything.
    pub(crate) token: Option<String>,
    /// Even with the token: access was not granted.
    pub(crate) is_gated: bool,
    /// Files on a page of the listing; all unless given.
    pub(crate) page: Option<usize>,
    /// By file, each for one answer; what comes after them is well.
    pub(crate) faults: HashMap<String, VecDeque<Fault>>,
    /// Done before the bytes of a file, by its name, are sent.
    pub(crate) before: Option<Before>,
}

/// `ORG/NAME` of the only repository.
pub(crate) const REPOSITORY: &str = "herd/tiny";

pub(crate) struct Hub {
    pub(crate) api: Server,
    pub(crate) content: Server,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Hub {
    pub(crate) async fn start(state: State) -> Self {
        Self::listen(state, "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1").await
    }

    /// On these addresses; the content server is known to others by the name `host`.
    pub(crate) async fn listen(state: State, hub: &str, content: &str, host: &str) -> Self {
        let state = Arc::new(Mutex::new(state));
        let of_content = Arc::clone(&state);
        let content =
            Server::listen(content, move |request| large(&mut of_content.lock().unwrap(), request)).await;
        let elsewhere = format!("http://{host}:{}", content.address().port());
        let of_hub = Arc::clone(&state);
        let api =
            Server::listen(hub, move |request| answer(&mut of_hub.lock().unwrap(), request, &elsewhere))
                .await;
        Self { api, content, state }
    }

    pub(crate) fn fault(&self, file: &str, faults: impl IntoIterator<Item = Fault>) {
        self.state.lock().unwrap().faults.insert(file.to_owned(), faults.into_iter().collect());
    }
}

fn answer(state: &mut State, request: &Request, elsewhere: &str) -> Response {
    let path = request.path().trim_start_matches('/').to_owned();
    if let Some(token) = &state.token {
        match request.headers.get("authorization") {
            None => return refusal(401, "GatedRepo"),
            Some(given) if *given != format!("Bearer {token}") => return refusal(401, ""),
            Some(_) if state.is_gated => return refusal(403, "GatedRepo"),
            Some(_) => {}
        }
    }
    if let Some(rest) = path.strip_prefix("api/models/") {
        let Some(rest) = rest.strip_prefix(&format!("{REPOSITORY}/")) else {
            return refusal(404, "RepoNotFound");
        };
        return match rest.split_once('/') {
            Some(("revision", revision)) => match commit_of(state, revision) {
                Some(commit) => Response::new(200, json!({"id": REPOSITORY, "sha": commit}).to_string()),
                None => refusal(404, "RevisionNotFound"),
            },
            Some(("tree", commit)) => tree(state, request, commit),
            _ => refusal(404, ""),
        };
    }
    let Some(rest) = path.strip_prefix(&format!("{REPOSITORY}/resolve/")) else {
        return refusal(404, "RepoNotFound");
    };
    let (commit, name) = rest.split_once('/').unwrap();
    match state.commits.get(commit).and_then(|files| files.get(name)) {
        None => refusal(404, "EntryNotFound"),
        Some(file) if file.is_large => {
            let to = format!("{elsewhere}/{commit}/{name}?X-Signature=abc");
            Response::new(302, "").with("location", to).with("x-linked-etag", format!("\"{}\"", file.oid))
        }
        Some(file) => content(state, file.clone(), name, request),
    }
}

fn large(state: &mut State, request: &Request) -> Response {
    let (commit, name) = request.path().trim_start_matches('/').split_once('/').unwrap();
    // As content servers of signed URLs do.
    if request.headers.contains_key("authorization") || request.query("X-Signature") != Some("abc") {
        return Response::new(400, "one kind of signature alone is allowed");
    }
    match state.commits.get(commit).and_then(|files| files.get(name)).cloned() {
        Some(file) => content(state, file, name, request),
        None => Response::new(403, "AccessDenied"),
    }
}

fn content(state: &mut State, file: HubFile, name: &str, request: &Request) -> Response {
    if let Some(before) = &state.before {
        before(name);
    }
    let fault = state.faults.get_mut(name).and_then(VecDeque::pop_front).unwrap_or(Fault::None);
    match fault {
        Fault::None => Response::file(file.bytes, request),
        Fault::End(end) => Response { end, ..Response::file(file.bytes, request) },
        Fault::Status(status, pause) => {
            let response = Response::new(status, "later");
            match pause {
                Some(pause) => response.with("retry-after", pause.to_string()),
                None => response,
            }
        }
        Fault::Flip(at) => {
            let mut bytes = (*file.bytes).clone();
            bytes[at] ^= 1;
            Response::file(Arc::new(bytes), request)
        }
        Fault::NoRanges => Response { status: 200, ..Response::new(200, (*file.bytes).clone()) },
        Fault::Short(size) => Response::file(Arc::new(file.bytes[..size].to_vec()), request),
    }
}

fn tree(state: &State, request: &Request, commit: &str) -> Response {
    let Some(files) = state.commits.get(commit) else { return refusal(404, "RevisionNotFound") };
    let folder = json!({"type": "directory", "path": "original", "size": 0, "oid": "0".repeat(40)});
    let listed = files.iter().map(|(path, HubFile { bytes, oid, is_large })| {
        let size = bytes.len();
        if *is_large {
            let lfs = json!({"oid": oid, "size": size, "pointerSize": 135});
            json!({"type": "file", "path": path, "size": size, "oid": "1".repeat(40), "lfs": lfs})
        } else {
            json!({"type": "file", "path": path, "size": size, "oid": oid})
        }
    });
    let all: Vec<_> = std::iter::once(folder).chain(listed).collect();
    let first: usize = request.query("cursor").map_or(0, |cursor| cursor.parse().unwrap());
    let last = state.page.map_or(all.len(), |page| (first + page).min(all.len()));
    let response = Response::new(200, json!(all[first..last]).to_string());
    if last == all.len() {
        return response;
    }
    let host = &request.headers["host"];
    let next = format!("http://{host}{}?recursive=true&cursor={last}", request.path());
    response.with("link", format!("<{next}>; rel=\"next\""))
}

fn commit_of(state: &State, revision: &str) -> Option<String> {
    let revision = revision.replace("%2F", "/");
    let is_commit = state.commits.contains_key(&revision);
    if is_commit { Some(revision) } else { state.branches.get(&revision).cloned() }
}

fn refusal(status: u16, code: &str) -> Response {
    Response::new(status, json!({"error": "no"}).to_string()).with("x-error-code", code)
}
