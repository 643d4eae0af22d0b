//! The `herd-gateway` binary.

use std::net::SocketAddr;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use crate::support::api_server::ApiServer;
use crate::support::scripted::{leader, says};
use crate::support::{http, soon};

fn herd_gateway() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd-gateway"));
    command.env_remove("RUST_LOG").stderr(Stdio::piped()).kill_on_drop(true);
    command.env("HERD_HTTP", "127.0.0.1:0").env("HERD_GRPC", "127.0.0.1:0").env("HERD_LOG_FORMAT", "json");
    command
}

/// Runs it until it listens: where HTTP is served, and the rest of its log.
async fn listening(mut command: Command) -> (Child, SocketAddr, Lines<BufReader<ChildStderr>>) {
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    loop {
        let line = soon(lines.next_line()).await.unwrap().expect("it ended");
        let fields = serde_json::from_str::<Value>(&line).unwrap()["fields"].clone();
        if fields["message"] == "listening" {
            return (child, fields["http"].as_str().unwrap().parse().unwrap(), lines);
        }
    }
}

async fn terminated(mut child: Child) {
    // The shell's own: the program is not on every machine.
    let kill = format!("kill -TERM {}", child.id().unwrap());
    assert!(Command::new("sh").args(["-c", &kill]).status().await.unwrap().success());
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_follows_the_cluster_of_its_kubeconfig_and_ends_with_sigterm() {
    let server = ApiServer::start().await;
    let worker = leader(says("yes")).start().await;
    for namespace in ["mine", "theirs"] {
        server.service(namespace, "tiny-leaders", &[namespace]);
        server.leader(namespace, "tiny-leaders", &worker.address, true);
    }
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", server.address)}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let mut command = herd_gateway();
    command.env("KUBECONFIG", &kubeconfig).env("HERD_KUBERNETES", "true").env("HERD_WATCH_NAMESPACE", "mine");
    let (child, address, _log) = listening(command).await;
    soon(async { while http::get(address, "/readyz").await.status != 200 {} }).await;
    // It waits for the gang where it is not connected yet.
    let body = |model: &str| serde_json::to_vec(&json!({"model": model, "prompt": "x"})).unwrap();
    let answer = http::post(address, "/v1/completions", &[], &body("mine")).await;
    assert_eq!(answer.json()["choices"][0]["text"], "yes");
    http::post(address, "/v1/completions", &[], &body("theirs")).await.refusal(404);
    // And what comes later.
    server.service("mine", "late-leaders", &["late"]);
    server.leader("mine", "late-leaders", &worker.address, true);
    soon(async { while http::post(address, "/v1/completions", &[], &body("late")).await.status != 200 {} })
        .await;
    terminated(child).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_the_gangs_that_it_is_given() {
    let worker = leader(says("yes")).start().await;
    let mut command = herd_gateway();
    command.env("HERD_KUBERNETES", "false").args(["--gang", &format!("tiny={}", worker.address)]);
    let (child, address, _log) = listening(command).await;
    let body = serde_json::to_vec(&json!({"model": "tiny", "prompt": "x"})).unwrap();
    assert_eq!(http::post(address, "/v1/completions", &[], &body).await.status, 200);
    terminated(child).await;
}

#[tokio::test]
async fn it_wants_one_way_to_find_gangs() {
    for (arguments, says) in [
        (&[][..], "no fleet is given"),
        (&["--kubernetes", "--gang", "tiny=127.0.0.1:1"][..], "exclude each other"),
        (&["--gang", "tiny"][..], "is not NAME=HOST:PORT"),
    ] {
        let output = soon(herd_gateway().args(arguments).output()).await.unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && log.contains(says), "{log}");
    }
}
