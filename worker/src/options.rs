//! What a worker is started with.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use herd_engine::{DEFAULT_STEP_TOKENS, FakeControl, FakeModel, FakeOptions, Isa};
use herd_model::{Dtype, Parallelism};
use herd_proto::internal::v1::Role;

use crate::backend::Model;
use crate::drafts::Drafts;
use crate::error::WorkerError;
use crate::gang::Host;
use crate::metrics::MetricOptions;
use crate::ranks::Expected;

/// Everything a worker is started with.
#[derive(Debug)]
pub struct WorkerOptions {
    /// What runs the model.
    pub backend: Backend,
    /// Where the internal gRPC service listens; port 0 takes a free one.
    pub grpc: SocketAddr,
    /// Where health and metrics listen; port 0 takes a free one.
    pub http: SocketAddr,
    /// Where rank 0 takes KV frames, rank N on the port N above; port 0 takes a free one for each rank.
    pub kv: SocketAddr,
    /// Name or address other gangs reach this worker at, without a port. None: the address `grpc` is bound to, which then
    /// has to be a definite one.
    pub advertise: Option<String>,
    /// "host:port" of each rank's KV connections as other gangs see them, where a proxy stands in between. None: `advertise`
    /// and the ports they are bound to.
    pub advertise_kv: Option<Vec<String>>,
    /// Bounds of one step and of the queue.
    pub limits: WorkerLimits,
    /// Whether tokens are guessed ahead, and how. What comes out is the same.
    pub drafts: Option<Drafts>,
    /// Of the LlamaDeployment; empty outside a cluster.
    pub revision: String,
    /// Named by the operator; None: a random one.
    pub gang_id: Option<String>,
    /// What is routed here to begin with; `SetRole` changes it while the worker runs.
    pub role: Role,
    /// Where the gang is several processes: which of them this is.
    pub part: Option<GangPart>,
    /// How long a drain waits for running requests unless its caller says otherwise.
    pub drain_deadline: Duration,
    /// How long KV blocks stay reserved for a prefill gang that does not renew.
    pub lease: Duration,
    /// How long a prompt that another gang computes waits for KV blocks here, if its caller does not give up earlier.
    pub blocks_deadline: Duration,
    /// How `/metrics` speaks.
    pub metrics: MetricOptions,
}

/// One process of a gang of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GangPart {
    /// Its first rank; the process with rank 0 leads.
    pub first_rank: usize,
    /// Ranks of each process; they divide the tensor degree: all are of one stage.
    pub ranks_per_pod: usize,
    /// "host:port" of the leader's internal gRPC service.
    pub leader: String,
    /// Where it takes connections of the other processes' ranks; port 0 takes a free one.
    pub bind: SocketAddr,
}

impl GangPart {
    /// Whether a gang split like this has such a part.
    pub(crate) fn check(&self, parallelism: Parallelism) -> Result<(), WorkerError> {
        let (tensor, all) = (parallelism.tensor, parallelism.ranks());
        let Self { first_rank, ranks_per_pod, leader: _, bind: _ } = self;
        if *ranks_per_pod == 0 || !tensor.is_multiple_of(*ranks_per_pod) {
            let problem = format!("{ranks_per_pod} does not divide the tensor degree, {tensor}");
            return Err(WorkerError::Option { option: "--ranks-per-pod", problem });
        }
        if *first_rank >= all || !first_rank.is_multiple_of(*ranks_per_pod) {
            let problem =
                format!("{first_rank} is not a multiple of {ranks_per_pod} below the ranks there are, {all}");
            return Err(WorkerError::Option { option: "--first-rank", problem });
        }
        Ok(())
    }

    /// Of this process.
    pub(crate) fn ranks(&self) -> Range<usize> {
        self.first_rank..self.first_rank.saturating_add(self.ranks_per_pod)
    }

    /// What the other processes of the gang have to be like.
    pub(crate) fn expected(&self, host: &Host, model: &Model) -> Expected {
        Expected {
            gang_id: host.gang_id.clone(),
            revision: host.revision.clone(),
            parallelism: model.shards.parallelism(),
            ranks_per_pod: self.ranks_per_pod,
            model_digest: model.digest.clone(),
            kv_fingerprint: model.kv_fingerprint.clone(),
        }
    }
}

/// Bounds of one gang.
#[derive(Clone, Copy, Debug)]
pub struct WorkerLimits {
    /// Tokens a step computes at most: the grain of cancelling.
    pub max_step_tokens: usize,
    /// Sequences that run at once.
    pub max_sequences: usize,
    /// Requests that wait for their start.
    pub max_waiting: usize,
    /// Tokens of prompt and completion together; None: what the model has.
    pub context_length: Option<usize>,
    /// Whether prompts that begin alike share KV, and it is kept for those to come.
    pub prefix_cache: bool,
    /// KV blocks each rank has room for in the host's memory beside its cache, for sequences that are preempted; with 0 they
    /// are computed again. Of the fake backend its own options say it.
    pub kv_host_blocks: usize,
}

/// What runs the model.
#[derive(Debug)]
pub enum Backend {
    /// A checkpoint, on CPUs.
    Cpu(CpuBackend),
    /// A checkpoint, on NVIDIA devices. This version finds them and computes nothing there: a worker does not start.
    Cuda,
    /// No weights: for tests of everything above the engine.
    Fake(Box<FakeBackend>),
}

/// The CPU backend's options.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    /// The checkpoint: `config.json`, safetensors, tokenizer.
    pub model_dir: PathBuf,
    /// Ranks of the gang.
    pub parallelism: Parallelism,
    /// Of activations and KV.
    pub dtype: Dtype,
    /// Size of the KV cache.
    pub kv: KvSize,
    /// Threads all ranks share.
    pub threads: usize,
    /// Instructions that compute.
    pub isa: Isa,
}

/// Size of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    /// Blocks a rank has.
    Blocks(usize),
    /// Bytes over all ranks.
    Bytes(u64),
}

/// The fake backend's options.
#[derive(Debug)]
pub struct FakeBackend {
    pub(crate) model: FakeModel,
    pub(crate) options: FakeOptions,
    pub(crate) context_length: usize,
    pub(crate) bundle: Option<PathBuf>,
}

impl FakeBackend {
    /// A model of this shape. Equal shapes but for tensor degree and KV blocks have equal digests.
    pub fn new(options: FakeOptions, context_length: usize) -> Self {
        Self { model: FakeModel::new(options.clone()), options, context_length, bundle: None }
    }

    /// Serves the files of this folder as its bundle.
    #[must_use]
    pub fn with_bundle(self, dir: impl Into<PathBuf>) -> Self {
        Self { bundle: Some(dir.into()), ..self }
    }

    /// Holds its steps and makes them fail.
    pub fn control(&self) -> FakeControl {
        self.model.control()
    }
}

impl Default for WorkerLimits {
    fn default() -> Self {
        Self {
            max_step_tokens: DEFAULT_STEP_TOKENS,
            max_sequences: 64,
            max_waiting: 256,
            context_length: None,
            prefix_cache: true,
            kv_host_blocks: 0,
        }
    }
}

/// Time a request gets to end by itself when a pod is removed: Kubernetes waits 30 s before it kills, the pods that the
/// operator makes wait longer.
pub const DEFAULT_DRAIN_DEADLINE: Duration = Duration::from_secs(25);

/// Three renewals, of which two may be lost.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(10);

/// As long as a caller without a deadline of its own should wait at all: blocks come free as sequences end, which takes
/// minutes where many long ones run. It also ends the knot of two gangs that wait for each other's blocks.
pub const DEFAULT_BLOCKS_DEADLINE: Duration = Duration::from_mins(10);

impl WorkerOptions {
    /// On free ports of the loopback interface, with the defaults for the rest.
    pub fn loopback(backend: Backend) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            backend,
            grpc: any,
            http: any,
            kv: any,
            advertise: None,
            advertise_kv: None,
            limits: WorkerLimits::default(),
            drafts: None,
            revision: String::new(),
            gang_id: None,
            role: Role::Unified,
            part: None,
            drain_deadline: DEFAULT_DRAIN_DEADLINE,
            lease: DEFAULT_LEASE,
            blocks_deadline: DEFAULT_BLOCKS_DEADLINE,
            metrics: MetricOptions::default(),
        }
    }
}
