//! HTTP, with what every request of a download needs: TLS by the system's certificates, proxies of the environment, pauses that
//! servers ask for. Redirects are followed by nobody unasked: a token must not go to another host.

use std::error::Error;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};
use reqwest::{Client, Request, Response, redirect};
use tokio::time::Instant;

use super::error::FetchError;
use super::retry::{Retry, random};

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Without a byte.
const READ_DEADLINE: Duration = Duration::from_mins(1);
const USER_AGENT: &str = concat!("herd-worker/", env!("CARGO_PKG_VERSION"));

/// A client for one source.
#[derive(Clone, Debug)]
pub(super) struct Http {
    client: Client,
    retry: Retry,
    /// The source, for messages.
    what: Arc<str>,
}

impl Http {
    pub(super) fn new(what: &str, retry: Retry) -> Result<Self, FetchError> {
        // Another part of the process may have been first, with the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(CONNECT_DEADLINE)
            .read_timeout(READ_DEADLINE)
            .redirect(redirect::Policy::none())
            .build()
            .map_err(|error| FetchError::Internal(format!("HTTP client: {}", chain(&error))))?;
        Ok(Self { client, retry, what: what.into() })
    }

    /// The answer, whatever it is, unless it only says to come again: then that is done, for as long as it is worth it.
    pub(super) async fn send(&self, request: Request) -> Result<Response, FetchError> {
        let since = Instant::now();
        let mut tries = 0;
        loop {
            let again = request
                .try_clone()
                .ok_or_else(|| FetchError::Internal("a request with a body".to_owned()))?;
            let (problem, asked) = match self.client.execute(again).await {
                Ok(response) if !is_passing(response.status()) => return Ok(response),
                Ok(response) => (format!("HTTP {}", response.status()), asked(response.headers())),
                Err(error) => (chain(&error.without_url()), None),
            };
            let Some(pause) = self.retry.pause(tries, since.elapsed(), asked, random()) else {
                return Err(match asked {
                    Some(asked) if asked >= self.retry.limit => FetchError::RateLimited {
                        what: self.what.to_string(),
                        asked,
                        limit: self.retry.limit,
                    },
                    _ => FetchError::Unreachable { what: self.what.to_string(), problem },
                });
            };
            tracing::warn!(?pause, "{}: {problem}; trying again", self.what);
            tries += 1;
            tokio::time::sleep(pause).await;
        }
    }
}

fn is_passing(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
        || status.is_server_error()
}

/// In seconds: servers of models give no dates.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// An error with its causes. The URL is left out by whoever calls: those of content servers hold signatures.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            // Writing to a string cannot fail.
            let _ = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_asked_for_in_seconds() {
        let headers = |value: &'static str| {
            HeaderMap::from_iter([(RETRY_AFTER, http::HeaderValue::from_static(value))])
        };
        assert_eq!(asked(&headers(" 7")), Some(Duration::from_secs(7)));
        assert_eq!(asked(&headers("Fri, 31 Dec 1999 23:59:59 GMT")), None);
        assert_eq!(asked(&HeaderMap::new()), None);
    }

    #[test]
    fn only_what_passes_is_tried_again() {
        let passing = [408, 429, 500, 503].map(|code| is_passing(StatusCode::from_u16(code).unwrap()));
        assert_eq!(passing, [true; 4]);
        let lasting =
            [200, 302, 401, 403, 404, 412, 416].map(|code| is_passing(StatusCode::from_u16(code).unwrap()));
        assert_eq!(lasting, [false; 7]);
    }
}
