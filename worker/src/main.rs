//! `herd-worker`: one gang, until SIGTERM or a fatal error.

mod fetch_command;
mod size;

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Parser, ValueEnum};
use herd_engine::{DEFAULT_STEP_TOKENS, Isa};
use herd_model::{Dtype, Parallelism};
use herd_worker::fetch::ModelLease;
use herd_worker::{
    Backend, CpuBackend, DEFAULT_BLOCKS_DEADLINE, DEFAULT_DRAFT_TOKENS, DEFAULT_DRAIN_DEADLINE,
    DEFAULT_LEASE, DraftSource, Drafts, Follower, GangPart, KvSize, MetricOptions, Role, StopSignals,
    TerminationMessage, Worker, WorkerError, WorkerLimits, WorkerOptions,
};
use tracing_subscriber::EnvFilter;

/// For what still runs on the runtime when `main` is done.
const RUNTIME_DEADLINE: Duration = Duration::from_secs(1);

/// Serves one gang of a model: internal gRPC, KV transfer, health and metrics.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Also: herd-worker fetch, resolve, prepare-cache, pause; each has a --help of its own."
)]
struct Args {
    /// Checkpoint: config.json, safetensors, tokenizer.
    #[arg(long, env = "HERD_MODEL_DIR")]
    model_dir: PathBuf,
    /// What computes: cpu, or cuda (NVIDIA devices).
    #[arg(long, env = "HERD_BACKEND", default_value = "cpu")]
    backend: BackendKind,
    /// Tensor degree.
    #[arg(long, env = "HERD_TENSOR", default_value_t = 1)]
    tensor: usize,
    /// Stages that the layers are split over.
    #[arg(long, env = "HERD_PIPELINE", default_value_t = 1)]
    pipeline: usize,
    /// Of activations and KV: f32 or bf16.
    #[arg(long, env = "HERD_DTYPE", default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// KV blocks of 64 tokens that each rank has.
    #[arg(long, env = "HERD_KV_BLOCKS", conflicts_with = "kv_memory")]
    kv_blocks: Option<usize>,
    /// Memory for KV over all ranks: bytes, or a number with KiB, MiB or GiB.
    #[arg(long, env = "HERD_KV_MEMORY", default_value = "2GiB", value_parser = parse_bytes)]
    kv_memory: u64,
    /// Threads that compute, over all ranks; as many as there are cores unless given.
    #[arg(long, env = "HERD_THREADS")]
    threads: Option<usize>,
    /// Instructions that compute on CPUs: portable, avx2, avx512 or amx; the best of this CPU unless given. KV moves between
    /// gangs of the same ones only.
    #[arg(long, env = "HERD_ISA")]
    isa: Option<Isa>,
    /// Tokens of prompt and completion together; the model's unless given.
    #[arg(long, env = "HERD_CONTEXT_LENGTH")]
    context_length: Option<usize>,
    /// Tokens a step computes at most.
    #[arg(long, env = "HERD_MAX_STEP_TOKENS", default_value_t = DEFAULT_STEP_TOKENS)]
    max_step_tokens: usize,
    /// Sequences that run at once.
    #[arg(long, env = "HERD_MAX_SEQUENCES", default_value_t = WorkerLimits::default().max_sequences)]
    max_sequences: usize,
    /// Requests that wait.
    #[arg(long, env = "HERD_MAX_WAITING", default_value_t = WorkerLimits::default().max_waiting)]
    max_waiting: usize,
    /// Whether prompts that begin alike share KV, which is kept for those to come: true or false.
    #[arg(long, env = "HERD_PREFIX_CACHE", default_value_t = true, action = clap::ArgAction::Set, value_parser = BoolishValueParser::new())]
    prefix_cache: bool,
    /// KV blocks each rank has room for in the host's memory, for sequences that have to give theirs to others; with 0 they
    /// are computed again.
    #[arg(long, env = "HERD_KV_HOST_BLOCKS", default_value_t = 0)]
    kv_host_blocks: usize,
    /// Whether tokens are guessed from what the sequence itself has said and several computed at once, where there is no draft
    /// model: true or false. Answers are the same.
    #[arg(long, env = "HERD_DRAFT_LOOKUP", default_value_t = false, action = clap::ArgAction::Set, value_parser = BoolishValueParser::new())]
    draft_lookup: bool,
    /// Guesses tokens with this checkpoint, a smaller one with the same tokenizer. Its weights and KV come on top of the model's.
    #[arg(long, env = "HERD_DRAFT_MODEL")]
    draft_model: Option<PathBuf>,
    /// Tokens that are guessed ahead for a sequence.
    #[arg(long, env = "HERD_DRAFT_TOKENS", default_value_t = DEFAULT_DRAFT_TOKENS)]
    draft_tokens: usize,
    /// Where the internal gRPC service listens.
    #[arg(long, env = "HERD_GRPC", default_value = "127.0.0.1:9000")]
    grpc: SocketAddr,
    /// Where /healthz, /readyz and /metrics listen.
    #[arg(long, env = "HERD_HTTP", default_value = "127.0.0.1:9001")]
    http: SocketAddr,
    /// Where rank 0 takes KV, rank N on the port N above.
    #[arg(long, env = "HERD_KV_BIND", default_value = "127.0.0.1:9100")]
    kv_bind: SocketAddr,
    /// Name or address other gangs reach this one at; needed where --grpc or --kv-bind is 0.0.0.0.
    #[arg(long, env = "HERD_ADVERTISE")]
    advertise: Option<String>,
    /// Generated unless given.
    #[arg(long, env = "HERD_GANG_ID")]
    gang_id: Option<String>,
    /// Where a gang is several processes: ranks that each of them has. It has to divide the tensor degree.
    #[arg(long, env = "HERD_RANKS_PER_POD", requires_all = ["leader", "gang_id"])]
    ranks_per_pod: Option<usize>,
    /// First of the ranks of this process; the one with rank 0 leads.
    #[arg(long, env = "HERD_FIRST_RANK", default_value_t = 0)]
    first_rank: usize,
    /// "host:port" of the leader's --grpc.
    #[arg(long, env = "HERD_LEADER")]
    leader: Option<String>,
    /// Where this process takes connections of the other processes' ranks.
    #[arg(long, env = "HERD_RANK_BIND", default_value = "127.0.0.1:9200")]
    rank_bind: SocketAddr,
    /// Of the LlamaDeployment.
    #[arg(long, env = "HERD_REVISION", default_value = "")]
    revision: String,
    /// What is routed here to begin with: unified, prefill or decode; `SetRole` changes it.
    #[arg(long, env = "HERD_ROLE", default_value = "unified")]
    role: FirstRole,
    /// Seconds a drain waits for running requests.
    #[arg(long, env = "HERD_DRAIN_DEADLINE", default_value_t = DEFAULT_DRAIN_DEADLINE.as_secs())]
    drain_deadline: u64,
    /// Whether /metrics also has what it says under the names that vLLM gives it: true or false.
    #[arg(long, env = "HERD_METRIC_ALIASES", default_value_t = true, action = clap::ArgAction::Set, value_parser = BoolishValueParser::new())]
    metric_aliases: bool,
    /// The model's name in the labels of those.
    #[arg(long, env = "HERD_MODEL_NAME", default_value = "")]
    model_name: String,
    /// Where the reason of a fatal error is written, if the file exists.
    #[arg(long, env = "HERD_TERMINATION_LOG", default_value = "/dev/termination-log")]
    termination_log: PathBuf,
    /// Lease of a downloaded model, held as long as it is served.
    #[arg(long, env = "HERD_MODEL_LEASE")]
    model_lease: Option<PathBuf>,
    /// How log lines look; `RUST_LOG` says which.
    #[arg(long, env = "HERD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BackendKind {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FirstRole {
    Unified,
    Prefill,
    Decode,
}

impl From<FirstRole> for Role {
    fn from(role: FirstRole) -> Self {
        match role {
            FirstRole::Unified => Self::Unified,
            FirstRole::Prefill => Self::Prefill,
            FirstRole::Decode => Self::Decode,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    if let Some(task) = fetch_command::asked() {
        return task.run();
    }
    let args = Args::parse();
    start_logging(args.log_format);
    let termination_log = args.termination_log.clone();
    let Err(error) = run(args) else { return ExitCode::SUCCESS };
    let message = TerminationMessage::from(&error);
    tracing::error!(reason = message.reason, "{}", message.message);
    if let Err(error) = message.write(&termination_log) {
        tracing::error!("cannot write {}: {error}", termination_log.display());
    }
    ExitCode::FAILURE
}

fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

fn run(args: Args) -> Result<(), WorkerError> {
    let internal = |error: std::io::Error| WorkerError::Internal(error.to_string());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(internal)?;
    let ended = runtime.block_on(async {
        let mut signals = StopSignals::listen().map_err(internal)?;
        let _lease = hold(args.model_lease.as_deref()).await?;
        serve(options(args), &mut signals).await
    });
    runtime.shutdown_timeout(RUNTIME_DEADLINE);
    ended
}

async fn hold(lease: Option<&Path>) -> Result<Option<ModelLease>, WorkerError> {
    let Some(path) = lease else { return Ok(None) };
    let problem = |error| WorkerError::Option {
        option: "--model-lease",
        problem: format!("cannot hold {}: {error}", path.display()),
    };
    ModelLease::hold(path).await.map(Some).map_err(problem)
}

async fn serve(options: WorkerOptions, signals: &mut StopSignals) -> Result<(), WorkerError> {
    match options.part.clone().filter(|part| part.first_rank > 0) {
        Some(part) => follow(options, part, signals).await,
        None => lead(options, signals).await,
    }
}

async fn follow(
    options: WorkerOptions,
    part: GangPart,
    signals: &mut StopSignals,
) -> Result<(), WorkerError> {
    let mut follower = tokio::select! {
        started = Follower::start(options, part) => started?,
        () = signals.next() => return Ok(()),
    };
    tokio::select! {
        error = follower.failed() => return Err(error),
        () = signals.next() => {}
    }
    tracing::info!("waits for the end of the epoch; a second signal does not");
    tokio::select! {
        () = follower.drain() => {}
        () = signals.next() => {}
    }
    follower.shutdown().await;
    Ok(())
}

async fn lead(options: WorkerOptions, signals: &mut StopSignals) -> Result<(), WorkerError> {
    let within = options.drain_deadline;
    let mut worker = tokio::select! {
        started = Worker::start(options) => started?,
        () = signals.next() => return Ok(()),
    };
    tokio::select! {
        error = worker.failed() => return Err(error),
        () = signals.next() => {}
    }
    tracing::info!(running = worker.running(), ?within, "draining; a second signal cuts what runs");
    let aborted = tokio::select! {
        aborted = worker.drain(None) => aborted,
        () = signals.next() => worker.drain(Some(Duration::ZERO)).await,
    };
    worker.shutdown().await;
    tracing::info!(aborted, "drained");
    Ok(())
}

fn options(args: Args) -> WorkerOptions {
    let Args {
        model_dir,
        backend,
        tensor,
        pipeline,
        dtype,
        kv_blocks,
        kv_memory,
        threads,
        isa,
        context_length,
        max_step_tokens,
        max_sequences,
        max_waiting,
        prefix_cache,
        kv_host_blocks,
        draft_lookup,
        draft_model,
        draft_tokens,
        grpc,
        http,
        kv_bind,
        advertise,
        gang_id,
        ranks_per_pod,
        first_rank,
        leader,
        rank_bind,
        revision,
        role,
        drain_deadline,
        metric_aliases,
        model_name,
        termination_log: _,
        model_lease: _,
        log_format: _,
    } = args;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let parallelism = Parallelism { tensor, pipeline };
    let draft_source =
        draft_model.map(DraftSource::Model).or(draft_lookup.then_some(DraftSource::PromptLookup));
    WorkerOptions {
        backend: match backend {
            BackendKind::Cpu => Backend::Cpu(CpuBackend {
                model_dir,
                parallelism,
                dtype,
                kv: kv_blocks.map_or(KvSize::Bytes(kv_memory), KvSize::Blocks),
                threads: threads.unwrap_or(cores),
                isa: isa.unwrap_or_else(Isa::detect),
            }),
            BackendKind::Cuda => Backend::Cuda,
        },
        grpc,
        http,
        kv: kv_bind,
        advertise,
        advertise_kv: None,
        limits: WorkerLimits {
            max_step_tokens,
            max_sequences,
            max_waiting,
            context_length,
            prefix_cache,
            kv_host_blocks,
        },
        drafts: draft_source.map(|source| Drafts { source, tokens: draft_tokens }),
        revision,
        gang_id,
        role: role.into(),
        // All ranks in one process are no part of anything.
        part: ranks_per_pod
            .zip(leader)
            .filter(|(ranks, _)| *ranks != parallelism.ranks())
            .map(|(ranks_per_pod, leader)| GangPart { first_rank, ranks_per_pod, leader, bind: rank_bind }),
        drain_deadline: Duration::from_secs(drain_deadline),
        lease: DEFAULT_LEASE,
        blocks_deadline: DEFAULT_BLOCKS_DEADLINE,
        metrics: MetricOptions { aliases: metric_aliases, model: model_name },
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    size::parse(text, &[("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)], "KiB, MiB or GiB")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Args::command().debug_assert();
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("3MiB"), Ok(3 << 20));
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert!(parse_bytes("2GB").is_err());
        assert!(parse_bytes("GiB").is_err());
        assert!(parse_bytes("99999999999999GiB").is_err());
    }
}
