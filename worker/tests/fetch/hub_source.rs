//! `hf://`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use herd_engine::{Checkpoint, CpuRanks, Isa, LoadOptions};
use herd_model::Dtype::Bf16;
use herd_model::{INDEX_FILE, LARGE_FILE_BYTES, Parallelism};
use herd_worker::fetch::{FetchError, Secret, fetch, resolve};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;

use crate::hub::{Fault, Hub, HubFile, REPOSITORY, State};
use crate::model::{
    COMMIT, FIRST, LATER, Node, SECOND, WEIGHT_BYTES, files, from_hub, hub_file, is_whole, pin, state,
};
use crate::server::End;

/// Where requests for a file began.
fn begun(hub: &Hub, file: &str) -> Vec<Option<usize>> {
    hub.content.asked_for(file).iter().map(crate::server::Request::from).collect()
}

#[tokio::test]
async fn ranks_get_the_files_they_need_once() {
    let hub = Hub::start(State { page: Some(3), ..state() }).await;
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    assert!(pin.starts_with(COMMIT) && pin.len() > COMMIT.len(), "{pin} does not say which hub it is of");
    let fetched = node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert_eq!(fetched.bytes, fetched.downloaded);
    assert!(hub.api.asked_for("README.md").is_empty() && hub.content.asked_for(".pth").is_empty());
    // Another pod of the node asks nobody.
    let asked = hub.api.seen().len();
    let again = node.fetch(source, &pin).await.unwrap();
    assert_eq!((again.bytes, again.downloaded), (fetched.bytes, 0));
    assert_eq!(hub.api.seen().len(), asked);
}

#[tokio::test]
async fn the_digest_is_that_of_the_same_files_elsewhere() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16");
    let mut state = State::default();
    let files = state.commits.entry(COMMIT.to_owned()).or_default();
    for entry in fs::read_dir(&fixture).unwrap() {
        let (name, path) =
            (entry.as_ref().unwrap().file_name().into_string().unwrap(), entry.unwrap().path());
        files.insert(name.clone(), hub_file(&name, fs::read(path).unwrap()));
    }
    let hub = Hub::start(state).await;
    let node = Node::new();
    let mut source = from_hub(&hub, None);
    source.source = format!("hf://{REPOSITORY}@{COMMIT}");
    let pin = resolve(source.clone()).await.unwrap().pin;
    node.fetch(source.clone(), &pin).await.unwrap();
    let digest = |folder: &Path| Checkpoint::open(folder).unwrap().digest().unwrap();
    assert_eq!(digest(&node.model(&source, &pin)), digest(&fixture));
}

/// A real checkpoint of four layers over two files, each large enough to be known by its header.
fn in_two_large_files() -> BTreeMap<String, HubFile> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16");
    let bytes = fs::read(fixture.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let is_first =
        |name: &str| ["embed_tokens", "layers.0.", "layers.1."].iter().any(|part| name.contains(part));
    let padding = vec![0; LARGE_FILE_BYTES as usize];
    let padding = TensorView::new(Dtype::U8, vec![padding.len()], &padding).unwrap();
    let mut weight_map = BTreeMap::new();
    let mut files = BTreeMap::new();
    for (file, wanted) in [(FIRST, true), (SECOND, false)] {
        let own = tensors.tensors().into_iter().filter(|(name, _)| is_first(name) == wanted);
        let own: Vec<_> = own.chain([(format!("padding of {file}"), padding.clone())]).collect();
        weight_map.extend(own[..own.len() - 1].iter().map(|(name, _)| (name.clone(), file)));
        files.insert(file.to_owned(), hub_file(file, safetensors::serialize(own, None).unwrap()));
    }
    let index = json!({"weight_map": weight_map}).to_string().into_bytes();
    files.insert(INDEX_FILE.to_owned(), hub_file(INDEX_FILE, index));
    for name in ["config.json", "tokenizer.json"] {
        files.insert(name.to_owned(), hub_file(name, fs::read(fixture.join(name)).unwrap()));
    }
    files
}

#[tokio::test]
async fn a_stage_opens_with_outlines_of_what_it_does_not_need() {
    let mut state = state();
    state.commits.insert(COMMIT.to_owned(), in_two_large_files());
    let hub = Hub::start(state).await;
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    let digest = |folder: &Path| Checkpoint::open(folder).unwrap().digest().unwrap();
    let mut options = node.options(source.clone(), &pin);
    let model = node.model(&source, &pin);
    let whole = Node::new();
    whole.fetch(source.clone(), &pin).await.unwrap();
    let whole = whole.model(&source, &pin);

    options.stage = Some((0, 2));
    let fetched = fetch(options.clone()).await.unwrap();
    assert!(fetched.bytes < 3 << 23, "{} bytes are one of the files and a half", fetched.bytes);
    assert_eq!(digest(&model), digest(&whole));
    let second = fs::metadata(model.join(SECOND)).unwrap();
    assert_eq!(second.len(), fs::metadata(whole.join(SECOND)).unwrap().len());
    assert!(second.blocks() * 512 < 1 << 20, "{} blocks", second.blocks());
    let load = |rank| {
        let parallelism = Parallelism { tensor: 1, pipeline: 2 };
        let isa = Isa::detect();
        let options = LoadOptions { parallelism, dtype: Bf16, kv_blocks: 1, host_blocks: 0, threads: 1, isa };
        CpuRanks::load(&model, &options, rank..rank + 1)
    };
    load(0).unwrap();
    // Asked for again, nothing comes, and whoever needs all of it gets it.
    assert_eq!(fetch(options.clone()).await.unwrap().downloaded, 0);
    options.stage = Some((1, 2));
    assert!(fetch(options.clone()).await.unwrap().downloaded > LARGE_FILE_BYTES);
    load(1).unwrap();
    for name in [FIRST, SECOND] {
        assert!(fs::read(model.join(name)).unwrap() == fs::read(whole.join(name)).unwrap(), "{name}");
    }
    assert!(!model.join(format!("{SECOND}.outline")).exists());
}

#[tokio::test]
async fn a_cut_connection_goes_on_where_it_ended() {
    let hub = Hub::start(state()).await;
    let cuts = [100_000, 50_000].map(|after| Fault::End(End::Cut(after)));
    hub.fault(FIRST, cuts);
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert_eq!(begun(&hub, FIRST), [None, Some(100_000), Some(150_000)]);
    assert_eq!(begun(&hub, SECOND), [None]);
}

#[tokio::test]
async fn another_process_goes_on_where_the_first_one_ended() {
    let hub = Hub::start(state()).await;
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    // Given up, with a part of the file there.
    hub.fault(FIRST, [Fault::End(End::Cut(120_000)), Fault::Status(403, None)]);
    let error = node.fetch(source.clone(), &pin).await.unwrap_err();
    assert_eq!(error.reason(), "SourceForbidden", "{error}");
    let fetched = node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert_eq!(begun(&hub, FIRST), [None, Some(120_000), Some(120_000)]);
    assert!(fetched.downloaded <= (2 * WEIGHT_BYTES - 120_000) as u64, "{fetched:?}");
}

#[tokio::test]
async fn a_server_without_ranges_begins_again() {
    let hub = Hub::start(state()).await;
    hub.fault(FIRST, [Fault::End(End::Cut(100_000)), Fault::NoRanges]);
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
}

#[tokio::test]
async fn a_busy_server_is_asked_again() {
    let hub = Hub::start(state()).await;
    hub.fault(FIRST, [Fault::Status(429, Some(0)), Fault::Status(503, None)]);
    hub.fault("config.json", [Fault::Status(429, Some(0))]);
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert_eq!(begun(&hub, FIRST).len(), 3);
}

#[tokio::test]
async fn a_pause_that_is_too_long_is_told() {
    let hub = Hub::start(state()).await;
    hub.fault(FIRST, [Fault::Status(429, Some(86_400))]);
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    let error = node.fetch(source, &pin).await.unwrap_err();
    assert_eq!(error.reason(), "SourceRateLimited");
    assert!(error.to_string().contains("86400s"), "{error}");
}

#[tokio::test]
async fn a_branch_that_moves_changes_nothing_of_what_was_resolved() {
    let hub = Hub::start(state()).await;
    let source = from_hub(&hub, None);
    let before = pin(&source).await;
    Node::new().fetch(source.clone(), &before).await.unwrap();
    hub.state.lock().unwrap().branches.insert("main".to_owned(), LATER.to_owned());
    // A pod that is made later, on another node.
    let node = Node::new();
    node.fetch(source.clone(), &before).await.unwrap();
    is_whole(&node.model(&source, &before), 1);
    // A new revision.
    let after = pin(&source).await;
    assert!(after.starts_with(LATER));
    node.fetch(source.clone(), &after).await.unwrap();
    is_whole(&node.model(&source, &after), 100);
    is_whole(&node.model(&source, &before), 1);
}

#[tokio::test]
async fn a_wrong_checksum_is_tried_once_more() {
    let hub = Hub::start(state()).await;
    hub.fault(FIRST, [Fault::Flip(7)]);
    hub.fault("tokenizer.json", [Fault::Flip(0)]);
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let first = pin(&source).await;
    node.fetch(source.clone(), &first).await.unwrap();
    is_whole(&node.model(&source, &first), 1);
    assert_eq!(begun(&hub, FIRST), [None, None]);

    for (file, kind) in [(SECOND, "SHA-256"), ("config.json", "git object")] {
        let node = Node::new();
        hub.fault(file, [Fault::Flip(1), Fault::Flip(1), Fault::Flip(1)]);
        let error = node.fetch(source.clone(), &first).await.unwrap_err();
        assert_eq!(error.reason(), "ChecksumMismatch");
        assert!(error.to_string().contains(file) && error.to_string().contains(kind), "{error}");
        assert!(!node.model(&source, &first).join(file).exists());
        hub.fault(file, []);
    }
}

#[tokio::test]
async fn a_file_that_is_shorter_than_listed_is_no_file() {
    let hub = Hub::start(state()).await;
    hub.fault(FIRST, vec![Fault::Short(1000); 8]);
    let (node, source) = (Node::new(), from_hub(&hub, None));
    let pin = pin(&source).await;
    let error = node.fetch(source.clone(), &pin).await.unwrap_err();
    assert_eq!(error.reason(), "SourceBroken", "{error}");
    assert!(error.to_string().contains(FIRST), "{error}");
    assert!(!node.model(&source, &pin).join(FIRST).exists());
}

#[tokio::test]
async fn a_token_goes_to_the_hub_alone() {
    let hub = Hub::start(State { token: Some("hf_right".to_owned()), ..state() }).await;
    let (node, source) = (Node::new(), from_hub(&hub, Some("hf_right\n")));
    let pin = pin(&source).await;
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    let with_token = |request: &crate::server::Request| request.headers.contains_key("authorization");
    assert!(hub.api.seen().iter().all(with_token));
    assert!(!hub.content.seen().is_empty() && !hub.content.seen().iter().any(with_token));
}

async fn refused(hub: &Hub, token: Option<&str>, source: Option<&str>) -> FetchError {
    let mut options = from_hub(hub, token);
    if let Some(source) = source {
        source.clone_into(&mut options.source);
    }
    resolve(options).await.unwrap_err()
}

#[tokio::test]
async fn who_may_not_have_it_is_told_what_to_do() {
    let hub = Hub::start(State { token: Some("hf_right".to_owned()), ..state() }).await;
    let error = refused(&hub, None, None).await;
    assert_eq!(error.reason(), "SourceUnauthorized");
    let said = error.to_string();
    assert!(said.starts_with("hf://herd/tiny asks who we are") && said.contains("model.secretRef"), "{said}");
    assert!(!said.contains('\n'), "{said}");

    let error = refused(&hub, Some("hf_wrong"), None).await;
    assert_eq!(error.reason(), "SourceUnauthorized");
    assert!(error.to_string().contains("the token of Secret hub-token is not valid"), "{error}");
    assert!(!error.to_string().contains("hf_wrong"));

    hub.state.lock().unwrap().is_gated = true;
    let error = refused(&hub, Some("hf_right"), None).await;
    assert_eq!(error.reason(), "SourceForbidden");
    assert!(error.to_string().contains("ask for access at http://127.0.0.1"), "{error}");
}

#[tokio::test]
async fn what_is_not_there_is_told() {
    let hub = Hub::start(state()).await;
    let error = refused(&hub, None, Some("hf://herd/other")).await;
    assert_eq!(error.reason(), "SourceNotFound");
    assert!(error.to_string().contains("is the name right"), "{error}");
    let error = refused(&hub, None, Some("hf://herd/tiny@nowhere")).await;
    assert!(error.to_string().contains("no branch, tag or commit \"nowhere\""), "{error}");
    let error = refused(&hub, None, Some("oci://herd/tiny")).await;
    assert_eq!(error.reason(), "InvalidOption");

    let only = |name: &str| [(name.to_owned(), hub_file(name, files(1)[name].clone()))];
    hub.state.lock().unwrap().commits.insert(COMMIT.to_owned(), only("config.json").into());
    let error = refused(&hub, None, None).await;
    assert_eq!(error.reason(), "ModelFilesMissing");
    assert!(error.to_string().contains("no model.safetensors"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told() {
    let hub = Hub::start(state()).await;
    let mut source = from_hub(&hub, None);
    source.retry.limit = std::time::Duration::from_millis(50);
    drop(hub);
    let error = resolve(source).await.unwrap_err();
    assert_eq!(error.reason(), "SourceUnreachable");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn a_pin_of_another_hub_is_refused() {
    let (hub, other) = (Hub::start(state()).await, Hub::start(state()).await);
    let pin = pin(&from_hub(&other, None)).await;
    let error = Node::new().fetch(from_hub(&hub, None), &pin).await.unwrap_err();
    assert_eq!(error.reason(), "SourceChanged");
    assert!(error.to_string().contains("another hub"), "{error}");
    let error = Node::new().fetch(from_hub(&hub, None), "main").await.unwrap_err();
    assert_eq!(error.reason(), "InvalidOption");
}

#[test]
fn a_token_is_no_part_of_what_is_shown() {
    assert!(!format!("{:?}", Secret("hf_right".to_owned())).contains("hf_right"));
}
