//! Gangs of several processes, on the CPU backend: each process is a leader or a follower of its own in this one.

use std::net::SocketAddr;

use herd_engine::Isa;
use herd_metrics::{check_page, worker as metrics};
use herd_model::{Dtype, Parallelism};
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{DecodeRequest, DescribeRequest, WatchRequest};
use herd_worker::{Backend, CpuBackend, Follower, GangPart, KvSize, Worker, WorkerError, WorkerOptions};
use tonic::Code;
use tonic::transport::Channel;

use crate::cpu::fixture;
use crate::gangs::{Answer, get, metric, prompt, request, soon};

const BF16: &str = "tiny-llama31-bf16";
const FP8: &str = "tiny-llama31-fbgemm-fp8";

/// What the processes of a gang have in common.
#[derive(Clone, Copy)]
struct Shape {
    model: &'static str,
    dtype: Dtype,
    parallelism: Parallelism,
    ranks_per_pod: usize,
}

/// One stage.
fn tensor(model: &'static str, dtype: Dtype, tensor: usize, ranks_per_pod: usize) -> Shape {
    Shape { model, dtype, parallelism: Parallelism::tensor(tensor), ranks_per_pod }
}

impl Shape {
    fn options(self, first_rank: usize) -> WorkerOptions {
        let Self { model, dtype, parallelism, ranks_per_pod } = self;
        let backend = CpuBackend {
            model_dir: fixture(model),
            parallelism,
            dtype,
            // Of another size in each process: the smallest counts.
            kv: KvSize::Blocks(40 - first_rank),
            threads: ranks_per_pod,
            isa: Isa::detect(),
        };
        let mut options = WorkerOptions::loopback(Backend::Cpu(backend));
        options.gang_id = Some("gang".to_owned());
        options
    }

    fn part(self, first_rank: usize, leader: SocketAddr) -> GangPart {
        GangPart {
            first_rank,
            ranks_per_pod: self.ranks_per_pod,
            leader: leader.to_string(),
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        }
    }

    async fn leader(self, grpc: SocketAddr) -> Worker {
        let mut options = self.options(0);
        options.grpc = grpc;
        options.part = Some(self.part(0, grpc));
        Worker::start(options).await.unwrap()
    }

    async fn follower(self, first_rank: usize, leader: SocketAddr) -> Follower {
        Follower::start(self.options(first_rank), self.part(first_rank, leader)).await.unwrap()
    }

    /// In one process.
    async fn whole(self) -> Worker {
        Worker::start(self.options(0)).await.unwrap()
    }

    async fn start(self) -> Gang {
        let leader = self.leader(SocketAddr::from(([127, 0, 0, 1], 0))).await;
        let mut followers = Vec::new();
        for first_rank in (self.ranks_per_pod..self.parallelism.ranks()).step_by(self.ranks_per_pod) {
            followers.push(self.follower(first_rank, leader.endpoint()).await);
        }
        soon(leader.ready()).await;
        Gang { leader, followers }
    }
}

struct Gang {
    leader: Worker,
    followers: Vec<Follower>,
}

async fn client(leader: SocketAddr) -> WorkerClient<Channel> {
    WorkerClient::connect(format!("http://{leader}")).await.unwrap()
}

async fn answer(worker: &Worker, asked: DecodeRequest) -> Answer {
    let mut client = client(worker.endpoint()).await;
    Answer::read(&mut soon(client.decode(asked)).await.unwrap().into_inner()).await.unwrap()
}

async fn epoch(worker: &Worker) -> u64 {
    soon(worker.ready()).await;
    client(worker.endpoint()).await.describe(DescribeRequest {}).await.unwrap().into_inner().epoch
}

fn asked(tokens: usize, temperature: f32) -> DecodeRequest {
    let prompt = prompt(tokens).into_iter().map(|id| id % 256).collect();
    let mut asked = request(prompt, 16);
    asked.sampling.as_mut().unwrap().temperature = temperature;
    asked
}

#[tokio::test]
async fn several_processes_answer_as_one_does_to_the_bit() {
    for (model, dtype, tensor, pipeline, ranks_per_pod) in [
        (BF16, Dtype::F32, 2, 1, 1),
        (BF16, Dtype::Bf16, 4, 1, 1),
        (FP8, Dtype::Bf16, 4, 1, 2),
        (FP8, Dtype::F32, 8, 1, 2),
        (BF16, Dtype::F32, 1, 4, 1),
        (FP8, Dtype::Bf16, 2, 2, 2),
        (FP8, Dtype::Bf16, 4, 3, 2),
    ] {
        let parallelism = Parallelism { tensor, pipeline };
        let shape = Shape { model, dtype, parallelism, ranks_per_pod };
        let of = format!("{model}, {parallelism:?} by {ranks_per_pod}");
        let (gang, whole) = (shape.start().await, shape.whole().await);
        let described = client(gang.leader.endpoint()).await.describe(DescribeRequest {}).await.unwrap();
        let described = described.into_inner();
        assert_eq!(described.kv_blocks as usize, 40 - (parallelism.ranks() - ranks_per_pod));
        assert_eq!((described.tensor as usize, described.pipeline as usize), (tensor, pipeline));
        for (tokens, temperature) in [(1, 0.0), (150, 0.9), (700, 0.0)] {
            let asked = asked(tokens, temperature);
            let expected = answer(&whole, asked.clone()).await;
            assert_eq!(answer(&gang.leader, asked).await, expected, "{of}");
        }
        assert_eq!(gang.followers.len(), parallelism.ranks() / ranks_per_pod - 1);
    }
}

#[tokio::test]
async fn kv_moves_between_processes_of_both_gangs() {
    let shape = |pipeline, ranks_per_pod| {
        let parallelism = Parallelism { tensor: 4, pipeline };
        Shape { model: FP8, dtype: Dtype::Bf16, parallelism, ranks_per_pod }
    };
    // At equal degree the answer is the same to the bit as together.
    let expected = answer(&shape(1, 4).whole().await, asked(150, 0.9)).await;
    for (prefill, decode) in
        [((1, 1), (1, 2)), ((1, 2), (1, 4)), ((1, 4), (1, 1)), ((2, 2), (1, 2)), ((1, 1), (3, 4))]
    {
        let (prefill, decode) = (shape(prefill.0, prefill.1), shape(decode.0, decode.1));
        let start = async |shape: Shape| {
            if shape.parallelism.ranks() == shape.ranks_per_pod {
                Gang { leader: shape.whole().await, followers: Vec::new() }
            } else {
                shape.start().await
            }
        };
        let (prefill, decode) = (start(prefill).await, start(decode).await);
        for _ in 0..3 {
            let asked =
                DecodeRequest { prefill_peer: prefill.leader.endpoint().to_string(), ..asked(150, 0.9) };
            assert_eq!(answer(&decode.leader, asked).await, expected);
        }
    }
}

#[tokio::test]
async fn a_process_that_is_lost_ends_the_epoch_and_the_next_one_answers_the_same() {
    // Two stages of two ranks: one of the same stage is lost, then one of the other.
    let shape =
        Shape { parallelism: Parallelism { tensor: 2, pipeline: 2 }, ..tensor(BF16, Dtype::F32, 1, 1) };
    let mut gang = shape.start().await;
    let expected = answer(&gang.leader, asked(150, 0.9)).await;
    let mut epochs = vec![epoch(&gang.leader).await];
    // A follower that goes in the middle of streams.
    for lost in [0, 2] {
        let mut client = client(gang.leader.endpoint()).await;
        let mut events = client.watch(WatchRequest {}).await.unwrap().into_inner();
        let mut long = asked(150, 0.9);
        long.sampling.as_mut().unwrap().max_tokens = 500;
        let mut stream = client.decode(long).await.unwrap().into_inner();
        soon(stream.message()).await.unwrap();
        drop(gang.followers.remove(lost));
        let ended = Answer::read(&mut stream).await.unwrap_err();
        assert_eq!(ended.code(), Code::Unavailable, "{ended}");
        // Watches end with the epoch.
        while let Ok(Some(_)) = soon(events.message()).await {}
        let refused = client.describe(DescribeRequest {}).await.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (Code::Unavailable, "this gang is not whole, not started")
        );
        let first_rank = lost + 1;
        gang.followers.insert(lost, shape.follower(first_rank, gang.leader.endpoint()).await);
        epochs.push(epoch(&gang.leader).await);
        assert_eq!(answer(&gang.leader, asked(150, 0.9)).await, expected);
    }
    epochs.dedup();
    assert_eq!(epochs.len(), 3, "each epoch has a number of its own");
}

#[tokio::test]
async fn what_ranks_give_each_other_is_counted_on_every_page() {
    let shape = tensor(FP8, Dtype::F32, 2, 1);
    let mut gang = shape.start().await;
    let (leader, follower) = (gang.leader.http(), gang.followers[0].http());
    answer(&gang.leader, asked(150, 0.0)).await;
    for http in [leader, follower] {
        let page = get(http, "/metrics").await.1;
        assert_eq!(check_page(&page, metrics::METRICS, metrics::ALIASES), [""; 0]);
    }
    let sent = metric(leader, "herd_rank_sent_bytes_total").await;
    // Hidden states of 150 tokens, more than once a layer.
    assert!(sent > 150 * 64 * 4, "{sent}");
    // The leader gets columns of logits too.
    let received = metric(leader, "herd_rank_received_bytes_total").await;
    assert!(received > sent, "{received} and {sent}");
    assert_eq!(metric(follower, "herd_rank_received_bytes_total").await, sent);
    assert_eq!(metric(follower, "herd_rank_sent_bytes_total").await, received);
    let clipped = metric(leader, "herd_fp8_rows_clipped_total").await;
    assert_eq!(metric(follower, "herd_fp8_rows_clipped_total").await, clipped);
    assert_eq!(metric(follower, "herd_steps_total").await, 0, "the leader speaks for the gang");

    assert_eq!(metric(leader, "herd_rank_connections_broken_total").await, 0);
    let before = metric(leader, "herd_gang_epoch").await;
    drop(gang.followers.remove(0));
    soon(async { while metric(leader, "herd_gang_epoch").await == before {} }).await;
    assert_eq!(metric(leader, "herd_gang_epoch").await, 0, "not whole");
}

#[tokio::test]
async fn followers_wait_for_a_leader_that_comes_back() {
    let shape = tensor(BF16, Dtype::F32, 2, 1);
    let gang = shape.start().await;
    let expected = answer(&gang.leader, asked(70, 0.0)).await;
    let endpoint = gang.leader.endpoint();
    assert!(soon(gang.leader.shutdown()).await.is_empty(), "nothing had to be cut");
    let leader = shape.leader(endpoint).await;
    soon(leader.ready()).await;
    assert_eq!(answer(&leader, asked(70, 0.0)).await, expected);
    drop(gang.followers);
}

#[tokio::test]
async fn a_process_with_another_model_is_not_taken() {
    let shape = tensor(BF16, Dtype::F32, 2, 1);
    let leader = shape.leader(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    for other in [Shape { model: FP8, ..shape }, Shape { dtype: Dtype::Bf16, ..shape }] {
        let mut follower = other.follower(1, leader.endpoint()).await;
        let error = soon(follower.failed()).await;
        assert!(matches!(error, WorkerError::Refused { .. }), "{error}");
        assert_eq!(error.reason(), "GangMismatch");
    }
}

#[tokio::test]
async fn a_gang_that_is_not_whole_is_not_ready_and_says_so() {
    let shape = tensor(BF16, Dtype::F32, 2, 1);
    let leader = shape.leader(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let refused = client(leader.endpoint()).await.decode(asked(5, 0.0)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(soon(leader.shutdown()).await.is_empty(), "nothing had to be cut");
}

#[tokio::test]
async fn ranks_that_are_no_part_of_the_gang_are_refused() {
    let shape = |degree, ranks_per_pod| tensor(BF16, Dtype::F32, degree, ranks_per_pod);
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    for (shape, first_rank) in [(shape(4, 3), 3), (shape(4, 0), 1), (shape(4, 2), 1), (shape(4, 2), 4)] {
        let part = shape.part(first_rank, nowhere);
        let error = Follower::start(shape.options(first_rank), part).await.unwrap_err();
        assert_eq!(error.reason(), "InvalidOption", "{error}");
    }
    // Would be a leader that waits for nobody.
    let mut options = shape(4, 3).options(0);
    options.part = Some(shape(4, 3).part(0, nowhere));
    assert_eq!(Worker::start(options).await.unwrap_err().reason(), "InvalidOption");
}
