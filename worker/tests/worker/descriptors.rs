//! A worker that has no file descriptor left.

use std::path::Path;
use std::process::Stdio;

use herd_proto::internal::v1::DescribeRequest;
use herd_proto::internal::v1::worker_client::WorkerClient;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::gangs::soon;

#[tokio::test]
async fn a_worker_without_descriptors_goes_on_and_takes_connections_again() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16");
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "ulimit -n 64; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_herd-worker"),
        "--model-dir",
    ]);
    command.arg(model).args(["--kv-blocks", "8", "--log-format", "json"]);
    for port in ["--grpc", "--http", "--kv-bind"] {
        command.args([port, "127.0.0.1:0"]);
    }
    let mut worker =
        command.env_remove("RUST_LOG").stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(worker.stderr.take().unwrap()).lines();
    let mut until = async |said: &str| {
        loop {
            let line: Value = serde_json::from_str(&soon(lines.next_line()).await.unwrap().unwrap()).unwrap();
            if line["fields"]["message"] == said {
                return line;
            }
        }
    };
    let endpoint = until("ready").await["fields"]["endpoint"].as_str().unwrap().to_owned();
    let mut client = WorkerClient::connect(format!("http://{endpoint}")).await.unwrap();
    let mut strangers = Vec::new();
    for _ in 0..100 {
        strangers.push(TcpStream::connect(&endpoint).await.unwrap());
    }
    until("failed to accept a connection").await;
    soon(client.describe(DescribeRequest {})).await.unwrap();
    drop(strangers);
    let mut another = soon(WorkerClient::connect(format!("http://{endpoint}"))).await.unwrap();
    soon(another.describe(DescribeRequest {})).await.unwrap();
}
