//! Several processes and one cache.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use herd_worker::fetch::{ModelLease, fetch};

use crate::hub::{Fault, Hub, REPOSITORY};
use crate::model::{FIRST, Node, SECOND, from_hub, is_whole, pin, state};
use crate::server::{End, Request};

const PATIENCE: Duration = Duration::from_mins(1);

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("this should have come about");
}

/// A process of its own, as an init container is.
fn process(node: &Node, hub: &Hub, pin: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd-worker"));
    command
        .arg("fetch")
        .env("HERD_MODEL_SOURCE", format!("hf://{REPOSITORY}"))
        .env("HERD_MODEL_PIN", pin)
        .env("HERD_CACHE_DIR", node.root())
        .env("HERD_CACHE_FOLDER", format!("hf/{REPOSITORY}/{pin}"))
        .env("HERD_CACHE_SIZE", "1Gi")
        .env("HERD_LOG_FORMAT", "json")
        .env("HF_ENDPOINT", hub.api.url())
        .env_remove("RUST_LOG")
        .env_remove("HF_TOKEN")
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

async fn ended(child: Child) -> (Option<i32>, String) {
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap());
    let output =
        tokio::time::timeout(PATIENCE, output).await.expect("the process should have ended").unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

#[tokio::test]
async fn of_two_at_once_one_downloads() {
    let hub = Hub::start(state()).await;
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    let both = tokio::join!(node.fetch(source.clone(), &pin), node.fetch(source.clone(), &pin));
    let downloaded = [both.0.unwrap().downloaded, both.1.unwrap().downloaded];
    assert!(downloaded.contains(&0) && downloaded != [0, 0], "{downloaded:?}");
    is_whole(&node.model(&source, &pin), 1);
    for file in [FIRST, SECOND] {
        assert_eq!(hub.content.asked_for(file).len(), 1, "{file}");
    }
}

#[tokio::test]
async fn who_is_killed_is_taken_over_from() {
    let hub = Hub::start(state()).await;
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    hub.fault(FIRST, [Fault::End(End::Stall(80_000))]);
    let mut holder = process(&node, &hub, &pin);
    let part = node.model(&source, &pin).join(format!("{FIRST}.part"));
    until(|| size(&part) == 80_000).await;
    let second = process(&node, &hub, &pin);
    // SIGKILL: nothing of it can tidy up.
    holder.kill().unwrap();
    holder.wait().unwrap();
    let (code, log) = ended(second).await;
    assert_eq!(code, Some(0), "{log}");
    is_whole(&node.model(&source, &pin), 1);
    let begun: Vec<_> = hub.content.asked_for(FIRST).iter().map(Request::from).collect();
    assert_eq!(begun, [None, Some(80_000)]);
}

#[tokio::test]
async fn one_that_takes_too_long_is_not_waited_for() {
    let hub = Hub::start(state()).await;
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    hub.fault(FIRST, [Fault::End(End::Stall(80_000))]);
    let mut holder = process(&node, &hub, &pin);
    until(|| !hub.content.asked_for(FIRST).is_empty()).await;
    let mut options = node.options(source, &pin);
    options.folder = format!("hf/{REPOSITORY}/{pin}");
    options.wait = Duration::ZERO;
    let error = fetch(options).await.unwrap_err();
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(error.reason(), "ModelCacheBusy", "{error}");
}

#[tokio::test]
async fn a_model_that_a_worker_holds_is_not_removed() {
    let hub = Hub::start(state()).await;
    let (mut node, source) = (Node::new(), from_hub(&hub, None));
    let first = pin(&source).await;
    node.fetch(source.clone(), &first).await.unwrap();
    let folder = node.model(&source, &first);
    let lease = ModelLease::hold(&folder.parent().unwrap().join("lease")).await.unwrap();
    // Room for one of them.
    node.bound = 700_000;
    hub.state.lock().unwrap().branches.insert("main".to_owned(), crate::model::LATER.to_owned());
    let second = pin(&source).await;
    let error = node.fetch(source.clone(), &second).await.unwrap_err();
    assert_eq!(error.reason(), "ModelCacheFull");
    assert!(error.to_string().contains(&format!("hf/{REPOSITORY}/{first}")), "{error}");
    is_whole(&folder, 1);
    drop(lease);
    node.fetch(source.clone(), &second).await.unwrap();
    is_whole(&node.model(&source, &second), 100);
    assert!(!folder.exists());
    // And once more the other way.
    node.fetch(source.clone(), &first).await.unwrap();
    is_whole(&folder, 1);
}

#[tokio::test]
async fn a_lease_that_nobody_made_cannot_be_held() {
    let node = Node::new();
    assert!(ModelLease::hold(&node.root().join("lease")).await.is_err());
    // As it is mounted into the worker: a file that only its owner may change.
    File::create(node.root().join("lease")).unwrap();
    ModelLease::hold(&node.root().join("lease")).await.unwrap();
}

#[tokio::test]
async fn a_fatal_error_is_written_down() {
    let hub = Hub::start(state()).await;
    let node = Node::new();
    let log = node.root().join("termination-log");
    File::create(&log).unwrap();
    let run = |task: &str, source: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_herd-worker"));
        command.args([task, "--source", source, "--log-format", "json", "--termination-log"]).arg(&log);
        command.env("HF_ENDPOINT", hub.api.url()).env_remove("HF_TOKEN").stderr(Stdio::piped());
        let child = command.stdout(Stdio::piped()).spawn().unwrap();
        ended(child)
    };
    let written = || -> serde_json::Value { serde_json::from_slice(&fs::read(&log).unwrap()).unwrap() };
    let (code, _) = run("resolve", "hf://herd/nowhere").await;
    assert_eq!((code, written()["reason"].as_str()), (Some(1), Some("SourceNotFound")));
    let (code, log) = run("resolve", "hf://herd/tiny").await;
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(written()["pin"].as_str().unwrap(), pin(&from_hub(&hub, None)).await);
}
