//! What a registry answers to a request without the right to it: `WWW-Authenticate`.

use std::collections::BTreeMap;

/// How the registry wants to be told who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token that is had at `realm`.
    Bearer { realm: String, service: Option<String> },
}

/// The challenge of a header that can be answered; a token before a password.
pub(crate) fn parse<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            basic = Some(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer") {
            let mut parameters = parameters(rest);
            if let Some(realm) = parameters.remove("realm") {
                return Some(Challenge::Bearer { realm, service: parameters.remove("service") });
            }
        }
    }
    basic
}

/// `a="x, y",b=z`
fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut parameters = BTreeMap::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
        let after = after.trim_start();
        let value;
        (value, rest) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        parameters.insert(name, value.trim().to_owned());
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(header: &str) -> Option<Challenge> {
        parse([header].into_iter())
    }

    #[test]
    fn a_bearer_challenge_names_where_tokens_are() {
        let header =
            r#"Bearer realm="https://auth.example/token?a=b",service="r, x",scope="repository:a:pull,push""#;
        let bearer = Challenge::Bearer {
            realm: "https://auth.example/token?a=b".to_owned(),
            service: Some("r, x".to_owned()),
        };
        assert_eq!(one(header), Some(bearer.clone()));
        assert_eq!(parse(["Basic realm=x", header].into_iter()), Some(bearer));
        let bare = Challenge::Bearer { realm: "http://x/t".to_owned(), service: Some("s".to_owned()) };
        assert_eq!(one("bearer service=s , realm=http://x/t"), Some(bare));
    }

    #[test]
    fn what_cannot_be_answered_is_no_challenge() {
        assert_eq!(one(r#"Basic realm="Registry""#), Some(Challenge::Basic));
        for other in ["", "Negotiate", "Bearer", r#"Bearer service="s""#] {
            assert_eq!(one(other), None, "{other}");
        }
    }
}
