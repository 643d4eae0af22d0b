//! The protocol of the Hugging Face hub: a branch is resolved to a commit, whose files are listed with their checksums and
//! served in ranges, often by another host.

use std::fmt::Write as _;

use futures::StreamExt as _;
use futures::stream::try_unfold;
use herd_model::HubModel;
use http::header::{AUTHORIZATION, CONTENT_RANGE, LINK, LOCATION, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};
use reqwest::{Method, Request, Response, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::error::FetchError;
use super::http::{Http, chain};
use super::remote::{Checksum, Content, Opened, RemoteFile, Secret};
use super::retry::Retry;

/// Of the hub itself.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Content servers of content servers.
const MAX_REDIRECTS: usize = 5;
/// A page has a thousand files.
const MAX_PAGES: usize = 100;
/// Of an answer that is no file of the model.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Hex digits of an endpoint in a pin.
const ENDPOINT_DIGITS: usize = 8;

/// For `hf://`.
#[derive(Clone, Debug, Default)]
pub struct HubOptions {
    /// Of a hub; the public one unless given.
    pub endpoint: Option<String>,
    /// Who asks; nobody in particular unless given.
    pub token: Option<Secret>,
}

/// A repository.
#[derive(Debug)]
pub(super) struct Hub {
    http: Http,
    what: String,
    endpoint: Url,
    is_default: bool,
    model: HubModel,
    token: Option<HeaderValue>,
    secret: Option<String>,
}

#[derive(Deserialize)]
struct RevisionInfo {
    sha: String,
}

#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    size: u64,
    oid: String,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    oid: String,
    size: u64,
}

impl Hub {
    pub(super) fn new(
        what: String,
        model: HubModel,
        secret: Option<String>,
        options: HubOptions,
        retry: Retry,
    ) -> Result<Self, FetchError> {
        let HubOptions { endpoint, token } = options;
        let endpoint = endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT).trim_end_matches('/');
        let problem = |problem: &str| FetchError::Option {
            option: "HF_ENDPOINT",
            problem: format!("{endpoint:?} {problem}"),
        };
        let url = Url::parse(endpoint).map_err(|error| problem(&format!("is no URL: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(problem("must be http:// or https://"));
        }
        let token = token.map(|Secret(token)| {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| {
                FetchError::Option {
                    option: "HF_TOKEN",
                    problem: "has characters that no token has".to_owned(),
                }
            })?;
            value.set_sensitive(true);
            Ok::<_, FetchError>(value)
        });
        Ok(Self {
            http: Http::new(&what, retry)?,
            is_default: endpoint == DEFAULT_ENDPOINT,
            endpoint: url,
            what,
            model,
            token: token.transpose()?,
            secret,
        })
    }

    pub(super) fn what(&self) -> &str {
        &self.what
    }

    /// The commit, and of another hub than the public one a word for it: what it serves under a commit's name is its own.
    pub(super) async fn resolve(&self) -> Result<String, FetchError> {
        let revision = encoded(self.model.wanted());
        let url = self.url(&format!("api/models/{}/revision/{revision}", self.model.repository()))?;
        let RevisionInfo { sha } = self.json(self.get(url).await?).await?;
        if !is_commit(&sha) {
            return Err(self.bad(format!("the commit of {:?} is {sha:?}", self.model.wanted())));
        }
        Ok(match self.endpoint_word() {
            None => sha,
            Some(word) => format!("{sha}-{word}"),
        })
    }

    pub(super) async fn list(&self, pin: &str) -> Result<Vec<RemoteFile>, FetchError> {
        let commit = self.commit(pin)?;
        let mut next =
            Some(self.url(&format!("api/models/{}/tree/{commit}?recursive=true", self.model.repository()))?);
        let mut files = Vec::new();
        for _ in 0..MAX_PAGES {
            let Some(url) = next.take() else { return Ok(files) };
            let response = self.get(url.clone()).await?;
            next = next_page(response.headers()).map(|link| self.same_origin(&url, &link)).transpose()?;
            let page: Vec<TreeEntry> = self.json(response).await?;
            files.extend(page.into_iter().filter(|entry| entry.kind == "file").map(file));
        }
        Err(self.bad(format!("more than {MAX_PAGES} pages of files")))
    }

    pub(super) async fn open(&self, pin: &str, file: &RemoteFile, from: u64) -> Result<Opened, FetchError> {
        let (commit, name) = (self.commit(pin)?, encoded(&file.name));
        let mut url = self.url(&format!("{}/resolve/{commit}/{name}", self.model.repository()))?;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.request(url.clone());
            if from > 0 {
                let range = HeaderValue::from_str(&format!("bytes={from}-"));
                request.headers_mut().insert(RANGE, range.map_err(|error| self.bad(error.to_string()))?);
            }
            let response = self.http.send(request).await?;
            let status = response.status();
            if status.is_redirection() {
                let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
                url = url.join(to).map_err(|error| self.bad(format!("a redirect to {to:?}: {error}")))?;
                continue;
            }
            return match status {
                StatusCode::OK => Ok(Opened::Content(content(response, 0))),
                StatusCode::PARTIAL_CONTENT => {
                    let begins = begins_at(response.headers());
                    let begins = begins.ok_or_else(|| self.bad("a part of a file, not which".to_owned()))?;
                    Ok(Opened::Content(content(response, begins)))
                }
                StatusCode::RANGE_NOT_SATISFIABLE => Ok(Opened::Shorter),
                status => {
                    Err(self.refused(status, response.headers(), &format!("{}/{}", self.what, file.name)))
                }
            };
        }
        Err(self.bad(format!("more than {MAX_REDIRECTS} redirects for {}", file.name)))
    }

    /// Of a pin that this endpoint made.
    fn commit<'a>(&self, pin: &'a str) -> Result<&'a str, FetchError> {
        let (commit, endpoint) = match pin.split_once('-') {
            Some((commit, endpoint)) => (commit, Some(endpoint)),
            None => (pin, None),
        };
        if !is_commit(commit) {
            let problem = format!("{pin:?} is no commit of a hub");
            return Err(FetchError::Option { option: "--pin", problem });
        }
        if self.endpoint_word().as_deref() != endpoint {
            let what = self.what.clone();
            let problem = format!("it was resolved by another hub than {}", self.endpoint);
            return Err(FetchError::Changed { what, problem });
        }
        Ok(commit)
    }

    fn endpoint_word(&self) -> Option<String> {
        (!self.is_default).then(|| {
            let mut word = format!("{:x}", Sha256::digest(self.endpoint.as_str()));
            word.truncate(ENDPOINT_DIGITS);
            word
        })
    }

    fn url(&self, path: &str) -> Result<Url, FetchError> {
        let text = format!("{}/{path}", self.endpoint.as_str().trim_end_matches('/'));
        Url::parse(&text).map_err(|error| FetchError::Internal(format!("{text}: {error}")))
    }

    /// With the token where, and only where, it goes to the hub itself.
    fn request(&self, url: Url) -> Request {
        let is_hub = url.origin() == self.endpoint.origin();
        let mut request = Request::new(Method::GET, url);
        if let Some(token) = self.token.as_ref().filter(|_| is_hub) {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        request
    }

    /// Follows redirects within the hub: those of a repository that was renamed.
    async fn get(&self, mut url: Url) -> Result<Response, FetchError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.http.send(self.request(url.clone())).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            match to.filter(|_| status.is_redirection()) {
                Some(to) => url = self.same_origin(&url, to)?,
                None => return Err(self.refused(status, response.headers(), &self.what)),
            }
        }
        Err(self.bad(format!("more than {MAX_REDIRECTS} redirects")))
    }

    fn same_origin(&self, from: &Url, to: &str) -> Result<Url, FetchError> {
        let url = from.join(to).ok().filter(|url| url.origin() == self.endpoint.origin());
        url.ok_or_else(|| self.bad(format!("it goes on at {to:?}, which is not {}", self.endpoint)))
    }

    async fn json<T: DeserializeOwned>(&self, mut response: Response) -> Result<T, FetchError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.transpose() {
            let chunk = chunk.map_err(|error| FetchError::Unreachable {
                what: self.what.clone(),
                problem: chain(&error.without_url()),
            })?;
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(self.bad(format!("more than {MAX_ANSWER_BYTES} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|error| self.bad(error.to_string()))
    }

    fn bad(&self, problem: String) -> FetchError {
        FetchError::BadAnswer { what: self.what.clone(), problem }
    }

    fn refused(&self, status: StatusCode, headers: &HeaderMap, what: &str) -> FetchError {
        let what = what.to_owned();
        let code = headers.get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
        let from = match &self.secret {
            Some(secret) => format!("the token of Secret {secret}"),
            None => "the token of HF_TOKEN".to_owned(),
        };
        let has_token = self.token.is_some();
        match status {
            StatusCode::UNAUTHORIZED if has_token => {
                let advice = format!("{from} is not valid here, or the repository is not there");
                FetchError::Unauthorized { what, advice }
            }
            StatusCode::UNAUTHORIZED => FetchError::Unauthorized {
                what,
                advice: "it is private, gated or not there; give model.secretRef: {name: SECRET}, a Secret with a key token"
                    .to_owned(),
            },
            StatusCode::FORBIDDEN if code == "GatedRepo" || has_token => {
                let page = self.endpoint.join(&self.model.repository()).map_or(String::new(), |url| url.to_string());
                let advice = format!("who {from} belongs to has to ask for access at {page}");
                FetchError::Forbidden { what, advice }
            }
            StatusCode::FORBIDDEN => FetchError::Forbidden {
                what,
                advice: "give model.secretRef: {name: SECRET}, a Secret with a key token".to_owned(),
            },
            StatusCode::NOT_FOUND => FetchError::NotFound {
                what,
                advice: match code {
                    "RevisionNotFound" => format!("it has no branch, tag or commit {:?}", self.model.wanted()),
                    "EntryNotFound" => "the repository has no such file".to_owned(),
                    _ => format!("is the name right? It was asked for at {}", self.endpoint),
                },
            },
            status => self.bad(format!("HTTP {status}")),
        }
    }
}

fn file(entry: TreeEntry) -> RemoteFile {
    let TreeEntry { kind: _, path, size, oid, lfs } = entry;
    let (size, checksum) = match lfs {
        Some(LargeFile { oid, size }) => (size, Checksum::Sha256(oid.to_ascii_lowercase())),
        None => (size, Checksum::GitBlob(oid.to_ascii_lowercase())),
    };
    RemoteFile { name: path, size, checksum, etag: None }
}

fn content(response: Response, from: u64) -> Content {
    let bytes = try_unfold(response, |mut response| async {
        match response.chunk().await {
            Ok(chunk) => Ok(chunk.map(|chunk| (chunk, response))),
            Err(error) => Err(chain(&error.without_url())),
        }
    });
    Content { from, bytes: bytes.boxed() }
}

/// Of `bytes FROM-TO/SIZE`.
fn begins_at(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    range.split_once('-')?.0.trim().parse().ok()
}

/// Of `<URL>; rel="next"`.
fn next_page(headers: &HeaderMap) -> Option<String> {
    let links = headers.get(LINK)?.to_str().ok()?;
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_owned())
}

fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// As one component of a URL's path.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_ranges_are_read() {
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(http::HeaderName::from_static(name), HeaderValue::from_static(value))])
        };
        let link = headers("link", "<https://h/x?cursor=a%3D>; rel=\"next\", <https://h/y>; rel=\"last\"");
        assert_eq!(next_page(&link).as_deref(), Some("https://h/x?cursor=a%3D"));
        assert_eq!(next_page(&headers("link", "<https://h/y>; rel=\"last\"")), None);
        assert_eq!(begins_at(&headers("content-range", "bytes 7-99/100")), Some(7));
        assert_eq!(begins_at(&headers("content-range", "bytes */100")), None);
        assert_eq!(encoded("refs/pr 1"), "refs%2Fpr%201");
    }

    #[test]
    fn a_token_is_shown_nowhere() {
        let model = HubModel { organisation: "a".to_owned(), name: "b".to_owned(), revision: None };
        let options = HubOptions { endpoint: None, token: Some(Secret("hf_secret".to_owned())) };
        assert!(!format!("{options:?}").contains("hf_secret"));
        let hub = Hub::new("hf://a/b".to_owned(), model, None, options, Retry::default()).unwrap();
        let shown = format!("{hub:?} {:?}", hub.request(hub.url("x").unwrap()));
        assert!(!shown.contains("hf_secret"), "{shown}");
    }
}
