//! `Rank.Join` on the leader: who calls is checked and handed to the leader's loop.

use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use herd_model::Parallelism;
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::rank_report::Report;
use herd_proto::internal::v1::rank_server::Rank;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use super::{MESSAGES, span};

/// For a caller to say who it is.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// A process that wants to be part of the gang.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(super) ranks: Range<usize>,
    pub(super) kv_blocks: usize,
    pub(super) host_blocks: usize,
    pub(super) endpoint: String,
    pub(super) kv_endpoints: Vec<String>,
    pub(super) plans: mpsc::Sender<wire::Plan>,
    pub(super) reports: Streaming<wire::RankReport>,
}

/// What every process of the gang has to have in common.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) gang_id: String,
    pub(crate) revision: String,
    pub(crate) parallelism: Parallelism,
    pub(crate) ranks_per_pod: usize,
    pub(crate) model_digest: String,
    pub(crate) kv_fingerprint: String,
}

/// The service of a leader.
#[derive(Clone, Debug)]
pub(crate) struct RankService {
    expected: Expected,
    candidates: mpsc::Sender<Candidate>,
}

impl RankService {
    pub(crate) fn new(expected: Expected, candidates: mpsc::Sender<Candidate>) -> Self {
        Self { expected, candidates }
    }
}

impl Expected {
    fn check(&self, hello: &wire::Hello) -> Result<(), Status> {
        let Self { gang_id, revision, parallelism, ranks_per_pod, model_digest, kv_fingerprint } = self;
        let differs = |field: &str, given: &dyn std::fmt::Display, ours: &dyn std::fmt::Display| {
            Err(Status::failed_precondition(format!("{field} is {given}, the leader's is {ours}")))
        };
        if hello.gang_id != *gang_id {
            return differs("gang_id", &hello.gang_id, gang_id);
        }
        if hello.revision != *revision {
            return differs("revision", &hello.revision, revision);
        }
        let Parallelism { tensor, pipeline } = parallelism;
        if hello.tensor as usize != *tensor {
            return differs("tensor", &hello.tensor, tensor);
        }
        if hello.pipeline as usize != *pipeline {
            return differs("pipeline", &hello.pipeline, pipeline);
        }
        if hello.model_digest != *model_digest {
            return differs("model_digest", &hello.model_digest, model_digest);
        }
        // Numerics of another instruction set: sums would differ from rank to rank.
        if hello.kv_fingerprint != *kv_fingerprint {
            return differs("kv_fingerprint", &hello.kv_fingerprint, kv_fingerprint);
        }
        let given = span(hello.first_rank, hello.ranks);
        let is_one = given.start > 0
            && given.start.is_multiple_of(*ranks_per_pod)
            && given.len() == *ranks_per_pod
            && given.end <= parallelism.ranks();
        if !is_one || hello.kv_endpoints.len() != given.len() {
            let all = parallelism.ranks();
            let message =
                format!("ranks {given:?} are not those of a process: {all} ranks, {ranks_per_pod} each");
            return Err(Status::failed_precondition(message));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Rank for RankService {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<wire::Plan, Status>> + Send>>;

    async fn join(
        &self,
        request: Request<Streaming<wire::RankReport>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let mut reports = request.into_inner();
        let first = timeout(HELLO_DEADLINE, reports.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello"))??;
        let Some(wire::RankReport { report: Some(Report::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first report is not a hello"));
        };
        self.expected.check(&hello)?;
        let wire::Hello { first_rank, ranks: count, kv_blocks, host_blocks, endpoint, kv_endpoints, .. } =
            hello;
        let (sender, mut plans) = mpsc::channel(MESSAGES);
        let candidate = Candidate {
            ranks: span(first_rank, count),
            kv_blocks: kv_blocks as usize,
            host_blocks: host_blocks as usize,
            endpoint,
            kv_endpoints,
            plans: sender,
            reports,
        };
        self.candidates
            .try_send(candidate)
            .map_err(|_| Status::unavailable("the leader takes nobody now: try again"))?;
        let plans = futures::stream::poll_fn(move |context| plans.poll_recv(context));
        Ok(Response::new(Box::pin(plans.map(Ok))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_part_of_the_same_gang_is_taken() {
        let expected = Expected {
            gang_id: "g".to_owned(),
            revision: "r".to_owned(),
            parallelism: Parallelism { tensor: 2, pipeline: 2 },
            ranks_per_pod: 2,
            model_digest: "d".to_owned(),
            kv_fingerprint: "f".to_owned(),
        };
        let hello = wire::Hello {
            gang_id: "g".to_owned(),
            revision: "r".to_owned(),
            tensor: 2,
            pipeline: 2,
            first_rank: 2,
            ranks: 2,
            model_digest: "d".to_owned(),
            kv_fingerprint: "f".to_owned(),
            kv_blocks: 1,
            host_blocks: 0,
            endpoint: "h:1".to_owned(),
            kv_endpoints: vec!["h:2".to_owned(), "h:3".to_owned()],
        };
        expected.check(&hello).unwrap();
        let changed = |change: fn(&mut wire::Hello)| {
            let mut hello = hello.clone();
            change(&mut hello);
            expected.check(&hello).unwrap_err().message().to_owned()
        };
        assert_eq!(changed(|hello| hello.gang_id = "x".to_owned()), "gang_id is x, the leader's is g");
        assert!(changed(|hello| hello.revision = "x".to_owned()).starts_with("revision"));
        assert!(changed(|hello| hello.tensor = 4).starts_with("tensor"));
        assert!(changed(|hello| hello.pipeline = 1).starts_with("pipeline"));
        assert!(changed(|hello| hello.model_digest = "x".to_owned()).starts_with("model_digest"));
        assert!(changed(|hello| hello.kv_fingerprint = "x".to_owned()).starts_with("kv_fingerprint"));
        for first_rank in [0, 1, 3, 4] {
            let hello = wire::Hello { first_rank, ..hello.clone() };
            assert!(expected.check(&hello).is_err(), "{first_rank}");
        }
        assert!(changed(|hello| hello.ranks = 1).starts_with("ranks 2..3"));
        assert!(changed(|hello| drop(hello.kv_endpoints.pop())).starts_with("ranks 2..4"));
    }
}
