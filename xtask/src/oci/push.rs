//! Pushes an image by the OCI distribution protocol.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use ureq::http::{Method, StatusCode};

use super::client::{Answer, Content, Failure, Request, authority, escaped};
use super::layout::{Blob, Parts};
use super::{Client, Layout};

/// Attempts at a blob or a manifest.
const ATTEMPTS: u32 = 5;
/// Before the second attempt; doubled before each further one.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause, also where the registry asks for a longer one.
const LONGEST: Duration = Duration::from_secs(30);

/// Where an image goes to.
#[derive(Debug, Clone)]
pub(crate) struct Target<'a> {
    pub(crate) repository: &'a str,
    pub(crate) tag: &'a str,
    /// A repository that may have some of the layers already.
    pub(crate) beside: Option<&'a str>,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// The registry has the image.
    There,
    /// So many bytes were sent.
    Sent(u64),
}

/// Sends what the registry does not have; `at` is told how far it is.
pub(crate) fn push(
    client: &Client,
    layout: &Layout,
    target: &Target<'_>,
    at: &dyn Fn(&str),
) -> Result<Pushed> {
    let push = Push { client, layout, target, scopes: scopes(target), at, pause: PAUSE };
    push.image()
}

fn scopes(target: &Target<'_>) -> Vec<String> {
    let own = format!("repository:{}:pull,push", target.repository);
    let beside = target.beside.map(|beside| format!("repository:{beside}:pull"));
    [own].into_iter().chain(beside).collect()
}

pub(super) struct Push<'a> {
    client: &'a Client,
    layout: &'a Layout,
    target: &'a Target<'a>,
    scopes: Vec<String>,
    at: &'a dyn Fn(&str),
    pause: Duration,
}

#[cfg(test)]
impl<'a> Push<'a> {
    pub(super) fn at_once(client: &'a Client, layout: &'a Layout, target: &'a Target<'a>) -> Self {
        Self { client, layout, target, scopes: scopes(target), at: &|_| (), pause: Duration::ZERO }
    }
}

impl Push<'_> {
    pub(super) fn image(&self) -> Result<Pushed> {
        let Target { repository, tag, beside: _ } = self.target;
        let image = format!("push {repository}:{tag} to {}", self.client.registry().host());
        let parts = self.layout.image()?;
        let tried = |what: &str, attempt: &dyn Fn() -> Result<u64, Failure>| {
            self.tried(what, attempt).with_context(|| format!("{image}: {what}"))
        };
        if tried("manifest", &|| Ok(u64::from(self.has_manifest(&parts.manifest)?)))? == 1 {
            return Ok(Pushed::There);
        }
        let mut sent = 0;
        let Parts { manifest, config, layers } = &parts;
        for (n, blob) in layers.iter().chain([config]).enumerate() {
            let what = format!("blob {} of {}, {}", n + 1, layers.len() + 1, blob.digest);
            sent += tried(&what, &|| self.blob(blob, &what))?;
        }
        sent += tried("manifest", &|| self.manifest(manifest))?;
        Ok(Pushed::Sent(sent))
    }

    /// Tries again what may succeed later.
    fn tried<T>(&self, what: &str, attempt: &dyn Fn() -> Result<T, Failure>) -> Result<T> {
        let mut pause = self.pause;
        let mut attempts = 1;
        loop {
            let failure = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) if attempts < ATTEMPTS && failure.is_passing() => failure,
                Err(failure) if attempts > 1 => {
                    return Err(failure).with_context(|| format!("after {attempts} attempts"));
                }
                Err(failure) => return Err(failure.into()),
            };
            attempts += 1;
            (self.at)(&format!("{what}, attempt {attempts}: {failure}"));
            let asked = match failure {
                Failure::Status { retry_after, .. } => retry_after.unwrap_or_default(),
                _ => Duration::ZERO,
            };
            thread::sleep(pause.max(asked).min(LONGEST));
            pause *= 2;
        }
    }

    fn has_manifest(&self, manifest: &Blob) -> Result<bool, Failure> {
        let url = self.url(&format!("manifests/{}", self.target.tag));
        let answer = self.send(Method::HEAD, url, &[("accept", &manifest.media_type)], Content::Nothing)?;
        match answer.status {
            StatusCode::OK => Ok(answer.header("docker-content-digest") == Some(&manifest.digest)),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(answer.failure()),
        }
    }

    /// Sends a blob that is not there; how many bytes that took.
    fn blob(&self, blob: &Blob, what: &str) -> Result<u64, Failure> {
        let head =
            self.send(Method::HEAD, self.url(&format!("blobs/{}", blob.digest)), &[], Content::Nothing)?;
        match head.status {
            StatusCode::OK => return Ok(0),
            StatusCode::NOT_FOUND => {}
            _ => return Err(head.failure()),
        }
        let mount = self.target.beside.map(|beside| {
            let (digest, beside) = (escaped(&blob.digest), escaped(beside));
            format!("?mount={digest}&from={beside}")
        });
        let uploads = format!("blobs/uploads/{}", mount.unwrap_or_default());
        let started = self.send(Method::POST, self.url(&uploads), &[], Content::Nothing)?;
        let location = match started.status {
            // It lies beside, and was taken from there.
            StatusCode::CREATED => return Ok(0),
            StatusCode::ACCEPTED => self.location(&started, &blob.digest)?,
            _ => return Err(started.failure()),
        };
        let path = self.layout.path(&blob.digest).map_err(|error| Failure::Answer(format!("{error:#}")))?;
        let sent = |bytes: u64| {
            (self.at)(&format!("{what}, {:.0} of {:.0} MB", bytes as f64 / 1e6, blob.size as f64 / 1e6));
        };
        let headers = [("content-type", "application/octet-stream")];
        let put = self.send(Method::PUT, location, &headers, Content::File(&path, blob.size, &sent))?;
        stored(&put, blob)
    }

    fn manifest(&self, manifest: &Blob) -> Result<u64, Failure> {
        let path =
            self.layout.path(&manifest.digest).map_err(|error| Failure::Answer(format!("{error:#}")))?;
        let content = Content::File(&path, manifest.size, &|_| ());
        let url = self.url(&format!("manifests/{}", self.target.tag));
        let put = self.send(Method::PUT, url, &[("content-type", &manifest.media_type)], content)?;
        stored(&put, manifest)
    }

    /// Where the content of an upload goes.
    fn location(&self, started: &Answer, digest: &str) -> Result<String, Failure> {
        let location = started.header("location").unwrap_or_default();
        let base = self.client.registry().url();
        let absolute = if location.starts_with('/') {
            format!("{}{location}", authority(&base))
        } else if location.starts_with("http://") || location.starts_with("https://") {
            location.to_owned()
        } else {
            return Err(Failure::Answer(format!("the registry names no place to upload to: {location:?}")));
        };
        let separator = if absolute.contains('?') { '&' } else { '?' };
        Ok(format!("{absolute}{separator}digest={}", escaped(digest)))
    }

    fn url(&self, rest: &str) -> String {
        format!("{}/v2/{}/{rest}", self.client.registry().url(), self.target.repository)
    }

    fn send(
        &self,
        method: Method,
        url: String,
        headers: &[(&'static str, &str)],
        content: Content<'_>,
    ) -> Result<Answer, Failure> {
        self.client.send(&Request { method, url, scopes: &self.scopes, headers, content })
    }
}

/// Whether the registry has what was sent.
fn stored(answer: &Answer, blob: &Blob) -> Result<u64, Failure> {
    if !answer.status.is_success() {
        return Err(answer.failure());
    }
    match answer.header("docker-content-digest") {
        Some(digest) if digest != blob.digest => {
            Err(Failure::Answer(format!("the registry stored {digest} in place of {}", blob.digest)))
        }
        _ => Ok(blob.size),
    }
}
