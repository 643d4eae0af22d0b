//! The `herd-worker` binary.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

fn herd_worker() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd-worker"));
    command.env_remove("RUST_LOG").stderr(Stdio::piped());
    for port in ["--grpc", "--http", "--kv-bind"] {
        command.args([port, "127.0.0.1:0"]);
    }
    command
}

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16")
}

#[test]
fn a_fatal_error_is_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("termination-log");
    std::fs::write(&log, "").unwrap();
    for (reason, model_dir, tensor) in
        [("ImpossibleParallelism", fixture(), "3"), ("ModelLoadFailed", dir.path().join("nowhere"), "1")]
    {
        let mut command = herd_worker();
        command.arg("--model-dir").arg(model_dir).args(["--tensor", tensor]);
        let status = command.arg("--termination-log").arg(&log).output().unwrap().status;
        assert_eq!(status.code(), Some(1));
        let message: serde_json::Value = serde_json::from_slice(&std::fs::read(&log).unwrap()).unwrap();
        assert_eq!(message["reason"], reason);
        assert!(!message["message"].as_str().unwrap().is_empty());
    }
}

#[test]
fn sigterm_drains_and_exits_with_success() {
    let mut command = herd_worker();
    command.arg("--model-dir").arg(fixture()).args(["--kv-blocks", "8", "--log-format", "json"]);
    let mut worker = command.spawn().unwrap();
    let mut lines = BufReader::new(worker.stderr.take().unwrap()).lines().map(Result::unwrap);
    let messages = |line: String| {
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        line["fields"]["message"].as_str().unwrap().to_owned()
    };
    assert!(lines.by_ref().map(messages).any(|message| message == "ready"));
    let killed = Command::new("kill").args(["-TERM", &worker.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(lines.map(messages).collect::<Vec<_>>(), ["draining", "drained"]);
    assert_eq!(worker.wait().unwrap().code(), Some(0));
}
