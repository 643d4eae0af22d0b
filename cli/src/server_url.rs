//! Where an OpenAI server is: what `--url` says.

use anyhow::bail;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request};

/// A server over plain HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerUrl {
    /// "host:port".
    pub(crate) authority: String,
    /// What stands before `/v1`, without a slash at its end.
    path: String,
}

impl ServerUrl {
    /// With `/v1` at its end or without.
    pub(crate) fn parse(url: &str) -> anyhow::Result<Self> {
        let Some(rest) = url.strip_prefix("http://") else {
            bail!("--url must begin with http://, not {url:?}");
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix("v1").unwrap_or(path).trim_end_matches('/');
        let path = if path.is_empty() { String::new() } else { format!("/{path}") };
        let authority =
            if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
        Ok(Self { authority, path })
    }

    /// A request of JSON for a path below.
    pub(crate) fn request(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> hyper::http::Result<Request<Full<Bytes>>> {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.path))
            .header("host", &self.authority)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_with_and_without_v1_are_the_same() {
        for (url, authority, path) in [
            ("http://host:1", "host:1", ""),
            ("http://host:1/", "host:1", ""),
            ("http://host:1/v1", "host:1", ""),
            ("http://host/a/v1/", "host:80", "/a"),
        ] {
            let parsed = ServerUrl::parse(url).unwrap();
            assert_eq!((parsed.authority.as_str(), parsed.path.as_str()), (authority, path), "{url}");
        }
        assert!(ServerUrl::parse("https://host").is_err());
    }
}
