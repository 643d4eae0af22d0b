//! Where images are pushed to.

use anyhow::{Result, ensure};

/// `HOST[:PORT][/PATH]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registry {
    host: String,
    path: String,
    plain: bool,
}

impl Registry {
    /// Reads it; one on this machine, or an `insecure` one, is spoken to without TLS.
    pub(crate) fn parse(text: &str, insecure: bool) -> Result<Self> {
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let path = path.trim_end_matches('/');
        ensure!(
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte)),
            "registry {text:?}: want HOST[:PORT]/PATH, without a scheme"
        );
        let valid = |part: &str| {
            let allowed =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
            let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
            let bytes = part.as_bytes();
            bytes.iter().copied().all(allowed) && ends(bytes.first()) && ends(bytes.last())
        };
        ensure!(
            path.is_empty() || path.split('/').all(valid),
            "registry {text:?}: its path has to be of a-z, 0-9, \".\", \"_\" and \"-\""
        );
        let plain = insecure || is_local(host);
        Ok(Self { host: host.to_owned(), path: path.to_owned(), plain })
    }

    /// The name of a repository within the registry.
    pub(crate) fn repository(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}/{name}", self.path) }
    }

    /// What a node pulls.
    pub(crate) fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{}:{tag}", self.host, self.repository(name))
    }

    /// The URL below which its API is.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.plain { "http" } else { "https" };
        format!("{scheme}://{}", self.api_host())
    }

    /// What credentials are kept by.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Whether there is TLS.
    pub(crate) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Docker Hub's name is not where its API is.
    fn api_host(&self) -> &str {
        if self.host == "docker.io" { "registry-1.docker.io" } else { &self.host }
    }
}

impl std::fmt::Display for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.host)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    ["localhost", "127.0.0.1", "[::1]"].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_names_repositories_and_references() {
        let registry = Registry::parse("ghcr.io/team/herd", false).unwrap();
        assert_eq!(registry.reference("herd-worker", "1"), "ghcr.io/team/herd/herd-worker:1");
        assert_eq!(registry.url(), "https://ghcr.io");
        let bare = Registry::parse("r.example:5000", true).unwrap();
        assert_eq!(bare.reference("herd-worker", "1"), "r.example:5000/herd-worker:1");
        assert_eq!(bare.url(), "http://r.example:5000");
        assert_eq!(Registry::parse("docker.io/me", false).unwrap().url(), "https://registry-1.docker.io");
    }

    #[test]
    fn only_this_machine_is_spoken_to_without_tls_unasked() {
        for local in ["localhost", "localhost:5000/x", "127.0.0.1:1/x", "[::1]:5000/x"] {
            assert!(Registry::parse(local, false).unwrap().is_plain(), "{local}");
        }
        for remote in ["localhost.example", "127.0.0.10:5000", "r.example/localhost"] {
            assert!(!Registry::parse(remote, false).unwrap().is_plain(), "{remote}");
        }
    }

    #[test]
    fn what_is_no_registry_is_refused() {
        for wrong in
            ["", "/x", "https://r.example/x", "r.example/Team", "r.example/a//b", "r.example/a:1", "r e/x"]
        {
            assert!(Registry::parse(wrong, false).is_err(), "{wrong}");
        }
    }
}
