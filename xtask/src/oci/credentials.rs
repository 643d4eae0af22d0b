//! Who one is to a registry: what `docker login` left in `~/.docker/config.json`.

use std::env;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::stream::{self, Stream};

/// How long a helper may take.
const HELPER: Duration = Duration::from_secs(30);

/// The user for which helpers give a token instead of a password.
const TOKEN_USER: &str = "<token>";

/// A user's secret, which is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// Exchanged for tokens of an hour.
    Identity(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// Of a registry's host; none where nobody has logged in.
    pub(crate) fn find(host: &str) -> Result<Option<Self>> {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")));
        let Some(file) = folder.map(|folder| folder.join("config.json")) else { return Ok(None) };
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        };
        // What serde says of broken JSON holds none of it.
        let config = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))?;
        if let Some(stored) =
            stored(&config, host).with_context(|| format!("{}: credentials of {host}", file.display()))?
        {
            return Ok(Some(stored));
        }
        match helper(&config, host) {
            Some((name, key)) => ask(&name, &key),
            None => Ok(None),
        }
    }

    /// The value of a header, where a password will do.
    pub(crate) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Self::Identity(_) => None,
        }
    }

    fn new(user: &str, secret: &str) -> Self {
        if user == TOKEN_USER {
            Self::Identity(secret.to_owned())
        } else {
            Self::Password { user: user.to_owned(), password: secret.to_owned() }
        }
    }
}

/// Names that a host's entries are under.
fn keys(host: &str) -> Vec<String> {
    let mut keys: Vec<String> = ["", "/v1/", "/v2/"]
        .iter()
        .flat_map(|end| [format!("{host}{end}"), format!("https://{host}{end}")])
        .collect();
    keys.push(format!("http://{host}"));
    if host == "docker.io" {
        keys.push("https://index.docker.io/v1/".to_owned());
    }
    keys
}

/// What is in the file itself.
fn stored(config: &Value, host: &str) -> Result<Option<Credentials>> {
    let Some(entry) = keys(host).iter().find_map(|key| config["auths"].get(key)) else { return Ok(None) };
    let text = |field: &str| entry[field].as_str().filter(|text| !text.is_empty());
    if let Some(token) = text("identitytoken") {
        return Ok(Some(Credentials::Identity(token.to_owned())));
    }
    if let Some(auth) = text("auth") {
        let decoded = STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        // Docker pads with zeros.
        let decoded = decoded.as_deref().map(|text| text.trim_end_matches('\0'));
        let (user, password) = decoded
            .and_then(|text| text.split_once(':'))
            .context("\"auth\" is not user:password in base64")?;
        return Ok(Some(Credentials::new(user, password)));
    }
    Ok(text("username").zip(text("password")).map(|(user, password)| Credentials::new(user, password)))
}

/// The helper that keeps a host's credentials, and the name it keeps them by.
fn helper(config: &Value, host: &str) -> Option<(String, String)> {
    let keys = keys(host);
    let own = keys.iter().find_map(|key| Some((config["credHelpers"].get(key)?.as_str()?, key)));
    if let Some((helper, key)) = own {
        return Some((helper.to_owned(), key.clone()));
    }
    let helper = config["credsStore"].as_str().filter(|helper| !helper.is_empty())?;
    // Those who have logged in are listed, without their secrets.
    let listed = keys.iter().find(|key| config["auths"].get(key).is_some())?;
    Some((helper.to_owned(), listed.clone()))
}

/// Asks `docker-credential-NAME`.
fn ask(name: &str, key: &str) -> Result<Option<Credentials>> {
    let program = format!("docker-credential-{name}");
    let mut get = Command::new(&program);
    get.arg("get").stdin(Stdio::piped()).stderr(Stdio::null());
    let mut answers = Stream::start(get, HELPER, stream::json)?;
    let mut input = answers.input().with_context(|| format!("{program} has no input"))?;
    input.write_all(key.as_bytes()).with_context(|| format!("{program}: write"))?;
    drop(input);
    let answer = answers.next().with_context(|| format!("{program} get {key}"))?;
    // It has none where it fails: the registry will say whether that matters.
    let Some(answer) = answer.filter(|answer| answer["Secret"].is_string()) else { return Ok(None) };
    let (Some(user), Some(secret)) = (answer["Username"].as_str(), answer["Secret"].as_str()) else {
        return Ok(None);
    };
    ensure!(!secret.is_empty(), "{program} get {key} gave an empty secret");
    Ok(Some(Credentials::new(user, secret)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_password_is_found_by_any_of_its_hosts_names() {
        let auth = STANDARD.encode("me:pass:word");
        for key in ["r.example", "https://r.example", "https://r.example/v1/"] {
            let config = json!({"auths": {key: {"auth": auth}}});
            let found = stored(&config, "r.example").unwrap().unwrap();
            assert_eq!(found.basic().unwrap(), format!("Basic {auth}"), "{key}");
            assert_eq!(stored(&config, "other.example").unwrap(), None);
        }
        let hub = json!({"auths": {"https://index.docker.io/v1/": {"username": "u", "password": "p"}}});
        assert!(stored(&hub, "docker.io").unwrap().is_some());
    }

    #[test]
    fn tokens_are_not_passwords() {
        let identity = Credentials::Identity("t".to_owned());
        assert_eq!(
            stored(&json!({"auths": {"r": {"auth": "", "identitytoken": "t"}}}), "r").unwrap(),
            Some(identity.clone())
        );
        assert_eq!(Credentials::new("<token>", "t"), identity);
        assert_eq!(identity.basic(), None);
    }

    #[test]
    fn a_broken_entry_is_an_error_without_the_secret() {
        let config = json!({"auths": {"r": {"auth": "secret"}}});
        let error = format!("{:#}", stored(&config, "r").unwrap_err());
        assert!(error.contains("base64") && !error.contains("secret"), "{error}");
        let shown = format!("{:?}", Credentials::new("me", "secret"));
        assert_eq!(shown, "Credentials");
    }

    #[test]
    fn helpers_are_asked_for_hosts_that_are_theirs() {
        let config =
            json!({"credHelpers": {"r": "ecr-login"}, "credsStore": "desktop", "auths": {"https://s": {}}});
        assert_eq!(helper(&config, "r"), Some(("ecr-login".to_owned(), "r".to_owned())));
        assert_eq!(helper(&config, "s"), Some(("desktop".to_owned(), "https://s".to_owned())));
        assert_eq!(helper(&config, "t"), None);
    }
}
