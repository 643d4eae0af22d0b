//! Images are made and pushed to a registry in this process.

mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;

use self::server::{Manners, Server};
use super::push::Push;
use super::{Client, Credentials, Layer, Layout, Pushed, Recipe, Registry, Target};

/// An image of two layers, the second larger than any buffer on the way.
struct Made {
    folder: TempDir,
    layout: Layout,
}

impl Made {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let content = folder.path().join("content");
        fs::create_dir_all(content.join("b")).unwrap();
        fs::write(content.join("b/large"), vec![7; 8 << 20]).unwrap();
        fs::write(content.join("a"), "1").unwrap();
        let layout = Layout::create(&folder.path().join("layout")).unwrap();
        let file = content.join("a");
        let recipe = Recipe {
            layers: vec![Layer::File(&file, "/usr/bin/a"), Layer::Tree(&content)],
            entrypoint: Some("/usr/bin/a"),
            user: Some("1:1"),
            annotations: vec![("title", "a".to_owned())],
        };
        recipe.make(&layout, "lk.local/a:1").unwrap();
        Self { folder, layout }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn layer(&self, n: usize) -> (String, Vec<u8>) {
        let digest = self.layout.image().unwrap().layers[n].digest.clone();
        let blob = fs::read(self.layout.path(&digest).unwrap()).unwrap();
        (digest, blob)
    }
}

fn client(server: &Server, credentials: Option<Credentials>) -> Client {
    let registry = Registry::parse(&format!("{}/team", server.address), false).unwrap();
    Client::new(registry, credentials)
}

const TARGET: Target<'_> = Target { repository: "team/a", tag: "1", beside: None };

fn pushed(client: &Client, made: &Made) -> anyhow::Result<Pushed> {
    Push::at_once(client, &made.layout, &TARGET).image()
}

fn whole(server: &Server, made: &Made) {
    let parts = made.layout.image().unwrap();
    let state = server.state();
    for blob in parts.layers.iter().chain([&parts.config]) {
        let stored = &state.blobs[&format!("team/a {}", blob.digest)];
        assert_eq!(*stored, fs::read(made.layout.path(&blob.digest).unwrap()).unwrap(), "{}", blob.digest);
    }
    let manifest = fs::read(made.layout.path(&parts.manifest.digest).unwrap()).unwrap();
    assert_eq!(state.manifests["team/a 1"], manifest);
}

fn me() -> Credentials {
    Credentials::Password { user: "me".to_owned(), password: "secret".to_owned() }
}

#[test]
fn the_same_content_is_the_same_image() {
    let (one, two) = (Made::new(), Made::new());
    assert_eq!(one.layout.image().unwrap(), two.layout.image().unwrap());
    assert_eq!(one.layer(0), two.layer(0));
}

#[test]
fn a_layer_tells_no_times_owners_or_masks() {
    use std::os::unix::fs::PermissionsExt as _;
    let made = Made::new();
    let content = made.path("content");
    let layer = |folder: &Path| {
        let mut bytes = Vec::new();
        Layer::Tree(folder).write(&mut bytes).unwrap();
        bytes
    };
    let first = layer(&content);
    fs::set_permissions(content.join("a"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(content.join("b"), fs::Permissions::from_mode(0o700)).unwrap();
    let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_hours(1);
    fs::File::options().append(true).open(content.join("a")).unwrap().set_modified(then).unwrap();
    assert_eq!(layer(&content), first);
    fs::set_permissions(content.join("a"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_ne!(layer(&content), first, "a program is one that can be run");
}

#[test]
fn the_folders_above_a_file_are_in_its_layer() {
    let made = Made::new();
    let (_, layer) = made.layer(0);
    let mut archive = tar::Archive::new(layer.as_slice());
    let entries = archive.entries().unwrap().map(|entry| {
        let entry = entry.unwrap();
        (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap())
    });
    let expected = [("usr/", 0o755), ("usr/bin/", 0o755), ("usr/bin/a", 0o644)];
    assert_eq!(entries.collect::<Vec<_>>(), expected.map(|(name, mode)| (name.to_owned(), mode)));
}

#[test]
fn an_image_is_pushed_once() {
    let (made, server) = (Made::new(), Server::start(Manners::default()));
    let client = client(&server, None);
    let Pushed::Sent(bytes) = pushed(&client, &made).unwrap() else { panic!("nothing was sent") };
    assert!(bytes > 8 << 20, "{bytes}");
    whole(&server, &made);
    let before = server.state().requests.len();
    assert_eq!(pushed(&client, &made).unwrap(), Pushed::There);
    assert_eq!(server.state().requests[before..], ["HEAD /v2/team/a/manifests/1"]);
}

#[test]
fn what_the_registry_has_is_not_sent() {
    let (made, server) = (Made::new(), Server::start(Manners::default()));
    let (digest, blob) = made.layer(1);
    server.state().blobs.insert(format!("team/a {digest}"), blob);
    let Pushed::Sent(bytes) = pushed(&client(&server, None), &made).unwrap() else {
        panic!("nothing was sent")
    };
    assert!(bytes < 8 << 20, "{bytes}");
    assert_eq!(server.state().count("POST "), 2, "one layer and the config");
    whole(&server, &made);
}

#[test]
fn a_layer_of_another_repository_is_taken_from_there() {
    for mounts in [true, false] {
        let (made, server) = (Made::new(), Server::start(Manners { mounts, ..Manners::default() }));
        let (digest, blob) = made.layer(1);
        server.state().blobs.insert(format!("team/b {digest}"), blob);
        let client = client(&server, None);
        let target = Target { beside: Some("team/b"), ..TARGET };
        Push::at_once(&client, &made.layout, &target).image().unwrap();
        assert_eq!(server.state().count("PUT /v2/team/a/blobs/"), if mounts { 2 } else { 3 });
        whole(&server, &made);
    }
}

#[test]
fn a_token_is_had_with_the_password_and_again_when_it_expires() {
    let bearer = me().basic();
    for token_lasts in [0, 2] {
        let manners = Manners { bearer: bearer.clone(), token_lasts, ..Manners::default() };
        let (made, server) = (Made::new(), Server::start(manners));
        pushed(&client(&server, Some(me())), &made).unwrap();
        whole(&server, &made);
        let state = server.state();
        let tokens = state.count("GET /token?service=tests&scope=repository%3Ateam%2Fa%3Apull%2Cpush");
        assert_eq!(tokens > 1, token_lasts > 0, "{:?}", state.requests);
    }
}

#[test]
fn tokens_for_nobody_need_no_password() {
    let manners = Manners { bearer: Some(String::new()), ..Manners::default() };
    let (made, server) = (Made::new(), Server::start(manners));
    pushed(&client(&server, None), &made).unwrap();
    whole(&server, &made);
}

#[test]
fn a_password_is_sent_where_it_is_asked_for() {
    let basic = me().basic();
    let (made, server) = (Made::new(), Server::start(Manners { basic, ..Manners::default() }));
    pushed(&client(&server, Some(me())), &made).unwrap();
    whole(&server, &made);
}

#[test]
fn without_a_login_it_says_so_at_once() {
    let basic = me().basic();
    for manners in [
        Manners { basic: basic.clone(), ..Manners::default() },
        Manners { bearer: basic, ..Manners::default() },
    ] {
        let (made, server) = (Made::new(), Server::start(manners));
        let error = format!("{:#}", pushed(&client(&server, None), &made).unwrap_err());
        assert!(error.contains("needs a login: docker login 127.0.0.1:"), "{error}");
        assert!(server.state().requests.len() <= 2, "{:?}", server.state().requests);
    }
}

#[test]
fn an_upload_that_is_cut_is_sent_again() {
    let (made, server) = (Made::new(), Server::start(Manners { cuts: 2, ..Manners::default() }));
    pushed(&client(&server, None), &made).unwrap();
    assert_eq!(server.state().count("PUT /v2/team/a/blobs/"), 5);
    whole(&server, &made);
}

#[test]
fn a_registry_that_stays_away_is_given_up_by_name() {
    let manners = Manners { refusals: 100, refuses_with: 503, ..Manners::default() };
    let (made, server) = (Made::new(), Server::start(manners));
    let error = format!("{:#}", pushed(&client(&server, None), &made).unwrap_err());
    let (digest, _) = made.layer(0);
    for part in ["push team/a:1 to 127.0.0.1:", &digest, "after 5 attempts", "PUT http://127.0.0.1:", "503"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(!error.contains("secret"), "{error}");
    assert_eq!(server.state().count("PUT /v2/team/a/blobs/"), 5);
}

#[test]
fn a_refusal_is_not_tried_again() {
    let manners = Manners { refusals: 100, refuses_with: 403, ..Manners::default() };
    let (made, server) = (Made::new(), Server::start(manners));
    let error = format!("{:#}", pushed(&client(&server, None), &made).unwrap_err());
    assert!(error.contains("answered 403") && !error.contains("attempts"), "{error}");
    assert_eq!(server.state().count("PUT /v2/team/a/blobs/"), 1);
}

#[test]
fn a_registry_that_stored_something_else_is_an_error() {
    let (made, server) = (Made::new(), Server::start(Manners { lies: true, ..Manners::default() }));
    let error = format!("{:#}", pushed(&client(&server, None), &made).unwrap_err());
    assert!(error.contains("stored sha256:other in place of"), "{error}");
}

#[test]
fn a_blob_that_changed_on_the_way_is_refused() {
    let (made, server) = (Made::new(), Server::start(Manners::default()));
    let (digest, mut blob) = made.layer(1);
    blob[600] ^= 1;
    fs::write(made.layout.path(&digest).unwrap(), blob).unwrap();
    let error = format!("{:#}", pushed(&client(&server, None), &made).unwrap_err());
    assert!(error.contains("400") && error.contains("DIGEST_INVALID"), "{error}");
}

/// A certificate of 127.0.0.2 that nobody else has signed, and its key; none without openssl.
fn certificate() -> Option<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-nodes",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-days",
        "2",
    ]);
    openssl.args(["-config", "/dev/null", "-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.2"]);
    openssl.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    openssl.arg("-keyout").arg(at("key")).arg("-out").arg(at("certificate"));
    openssl.output().ok().filter(|output| output.status.success())?;
    let certificate = CertificateDer::from_pem_file(at("certificate")).unwrap();
    Some((certificate, PrivateKeyDer::from_pem_file(at("key")).unwrap()))
}

#[test]
fn with_tls_only_who_is_trusted_gets_an_image() {
    let Some((certificate, key)) = certificate() else {
        println!("skipped: there is no openssl to make a certificate with");
        return;
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.clone()], key).unwrap();
    let server = Server::start_with_tls(Arc::new(config));
    let registry = Registry::parse(&format!("{}/team", server.address), false).unwrap();
    let made = Made::new();
    let stranger = Client::trusting(registry.clone(), None, Vec::new);
    let error = format!("{:#}", pushed(&stranger, &made).unwrap_err());
    assert!(error.contains("UnknownIssuer"), "{error}");
    assert_eq!(server.state().requests, [""; 0]);
    pushed(&Client::trusting(registry, None, || vec![certificate]), &made).unwrap();
    whole(&server, &made);
}
