//! The `herd-worker` binary.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{DecodeRequest, DescribeRequest, Role, SetRoleRequest};
use tokio::io::AsyncBufReadExt as _;
use tonic::transport::Channel;

use crate::gangs::{Answer, request, soon};
use crate::stub::Stub;

fn herd_worker() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd-worker"));
    command.env_remove("RUST_LOG").stderr(Stdio::piped());
    for port in ["--grpc", "--http", "--kv-bind"] {
        command.args([port, "127.0.0.1:0"]);
    }
    command
}

fn fixture() -> std::path::PathBuf {
    crate::cpu::fixture("tiny-llama31-bf16")
}

fn message(line: &str) -> String {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    line["fields"]["message"].as_str().unwrap().to_owned()
}

fn terminate(process: u32) {
    signal("-TERM", process);
}

fn signal(signal: &str, process: u32) {
    // The shell's own: the program is not on every machine.
    let kill = format!("kill {signal} {process}");
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
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
    assert!(lines.by_ref().any(|line| message(&line) == "ready"));
    terminate(worker.id());
    let messages: Vec<_> = lines.map(|line| message(&line)).collect();
    assert_eq!(messages, ["draining; a second signal cuts what runs", "drained"]);
    assert_eq!(worker.wait().unwrap().code(), Some(0));
}

type Log = tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStderr>>;

/// Runs it until it is ready.
async fn ready(mut command: tokio::process::Command) -> (tokio::process::Child, Log, WorkerClient<Channel>) {
    let mut worker = command.kill_on_drop(true).spawn().unwrap();
    let mut lines = tokio::io::BufReader::new(worker.stderr.take().unwrap()).lines();
    let ready = soon(async {
        loop {
            let line = lines.next_line().await.unwrap().unwrap();
            if message(&line) == "ready" {
                return serde_json::from_str::<serde_json::Value>(&line).unwrap();
            }
        }
    })
    .await;
    let address = format!("http://{}", ready["fields"]["endpoint"].as_str().unwrap());
    (worker, lines, WorkerClient::connect(address).await.unwrap())
}

#[tokio::test]
async fn it_begins_in_the_role_it_is_given() {
    for (given, role) in
        [(None, Role::Unified), (Some("prefill"), Role::Prefill), (Some("decode"), Role::Decode)]
    {
        let mut command = tokio::process::Command::from(herd_worker());
        command.arg("--model-dir").arg(fixture()).args(["--kv-blocks", "8", "--log-format", "json"]);
        command.env_remove("HERD_ROLE").envs(given.map(|role| ("HERD_ROLE", role)));
        let (_worker, _log, mut client) = ready(command).await;
        let described = client.describe(DescribeRequest {}).await.unwrap().into_inner();
        assert_eq!(described.role(), role);
        let other = if role == Role::Decode { Role::Prefill } else { Role::Decode };
        client.set_role(SetRoleRequest { role: other.into() }).await.unwrap();
        assert_eq!(client.describe(DescribeRequest {}).await.unwrap().into_inner().role(), other);
    }
    let mut command = herd_worker();
    let refused = command.arg("--model-dir").arg(fixture()).args(["--role", "leader"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("unified, prefill, decode"), "{said}");
}

#[tokio::test]
async fn a_second_sigterm_cuts_what_runs() {
    let mut command = tokio::process::Command::from(herd_worker());
    command.arg("--model-dir").arg(fixture()).args(["--kv-blocks", "8", "--log-format", "json"]);
    command.args(["--drain-deadline", "3600"]);
    let (mut worker, mut lines, mut client) = ready(command).await;
    // A request that runs: its prefill never ends.
    let mut stub = Stub::start().await;
    let asked = DecodeRequest { prefill_peer: stub.address.clone(), ..request(vec![1; 100], 10) };
    let mut stream = client.decode(asked).await.unwrap().into_inner();
    let _prefill = stub.call().await;

    terminate(worker.id().unwrap());
    let line = soon(lines.next_line()).await.unwrap().unwrap();
    assert_eq!(message(&line), "draining; a second signal cuts what runs");
    terminate(worker.id().unwrap());
    assert_eq!(soon(worker.wait()).await.unwrap().code(), Some(0));
    assert!(soon(stream.message()).await.is_err());
}

/// One process of a gang of two, and its log.
struct Part {
    process: tokio::process::Child,
    log: Log,
}

impl Part {
    fn start(first_rank: &str, leader: &str, grpc: &str) -> Self {
        let mut command = tokio::process::Command::from(Command::new(env!("CARGO_BIN_EXE_herd-worker")));
        command.env_remove("RUST_LOG").stderr(Stdio::piped()).kill_on_drop(true);
        command.arg("--model-dir").arg(fixture()).args(["--kv-blocks", "8", "--log-format", "json"]);
        command.args(["--tensor", "2", "--ranks-per-pod", "1", "--gang-id", "g", "--first-rank", first_rank]);
        command.args(["--leader", leader, "--grpc", grpc, "--rank-bind", "127.0.0.1:0"]);
        command.args(["--http", "127.0.0.1:0", "--kv-bind", "127.0.0.1:0"]);
        let mut process = command.spawn().unwrap();
        let log = tokio::io::BufReader::new(process.stderr.take().unwrap()).lines();
        Self { process, log }
    }

    /// Reads on until a line whose message this is; the line.
    async fn says(&mut self, wanted: &str) -> String {
        soon(async {
            loop {
                let line = self.log.next_line().await.unwrap().unwrap();
                if message(&line) == wanted {
                    return line;
                }
            }
        })
        .await
    }

    fn signal(&self, name: &str) {
        signal(name, self.process.id().unwrap());
    }
}

/// Leader and follower, in an epoch, and the leader's client.
async fn two_processes() -> (Part, Part, WorkerClient<Channel>) {
    let grpc = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut follower = Part::start("1", &grpc, "127.0.0.1:0");
    let mut leader = Part::start("0", &grpc, &grpc);
    leader.says("ready").await;
    follower.says("part of the epoch").await;
    let client = WorkerClient::connect(format!("http://{grpc}")).await.unwrap();
    (leader, follower, client)
}

async fn epoch(client: &mut WorkerClient<Channel>) -> u64 {
    client.describe(DescribeRequest {}).await.unwrap().into_inner().epoch
}

async fn answer(client: &mut WorkerClient<Channel>) -> Result<Answer, tonic::Status> {
    let mut stream = client.decode(request(vec![1; 100], 10)).await?.into_inner();
    Answer::read(&mut stream).await
}

/// Stopped and not gone: nothing closes a connection.
#[tokio::test]
async fn a_follower_that_is_stopped_ends_the_epoch_and_one_that_goes_on_is_taken_again() {
    let (mut leader, mut follower, mut client) = two_processes().await;
    let (first, expected) = (epoch(&mut client).await, answer(&mut client).await.unwrap());
    follower.signal("-STOP");
    // Runs into the process that does not answer.
    assert_eq!(answer(&mut client).await.unwrap_err().code(), tonic::Code::Unavailable);
    leader.says("the epoch is over").await;
    assert!(client.describe(DescribeRequest {}).await.is_err());
    follower.signal("-CONT");
    leader.says("ready").await;
    assert_ne!(epoch(&mut client).await, first);
    assert_eq!(answer(&mut client).await.unwrap(), expected);

    // The leader drains; its follower waits for that, and both end well.
    follower.signal("-TERM");
    leader.signal("-TERM");
    leader.says("drained").await;
    for part in [&mut leader, &mut follower] {
        assert_eq!(soon(part.process.wait()).await.unwrap().code(), Some(0));
    }
}

#[tokio::test]
async fn a_leader_that_is_stopped_ends_the_epoch_for_its_follower() {
    let (mut leader, mut follower, mut client) = two_processes().await;
    let expected = answer(&mut client).await.unwrap();
    leader.signal("-STOP");
    let line = follower.says("not in an epoch").await;
    assert!(line.contains("the leader has said nothing"), "{line}");
    leader.signal("-CONT");
    leader.says("ready").await;
    assert_eq!(answer(&mut client).await.unwrap(), expected);
}
