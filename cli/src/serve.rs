//! `herd serve`: gateway and workers over loopback, no cluster.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use futures::future::{join_all, select_all, try_join_all};
use herd_engine::Isa;
use herd_gateway::{FixedFleet, GangEndpoint, Gateway, GatewayOptions, ReservedPort};
use herd_model::{BLOCK_TOKENS, Dtype, ModelConfig, Parallelism, ShardPlan};
use herd_worker::{
    Backend, CpuBackend, DEFAULT_DRAFT_TOKENS, DraftSource, Drafts, KvSize, MetricOptions, Role, StopSignals,
    Worker, WorkerOptions,
};
use tracing_subscriber::EnvFilter;

use crate::text_model;

/// For the gangs to be found once they have loaded.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// Contexts that a gang's KV cache holds, memory permitting.
const CONTEXTS: usize = 8;
/// Of the memory that is free before anything is loaded and that weights do not need, this part is KV.
const KV_SHARE: u64 = 2;
/// Taken for granted where the system does not tell what is free: enough for a small model.
const UNKNOWN_MEMORY: u64 = 4 << 30;

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// Checkpoint: config.json, safetensors, tokenizer
    model_dir: PathBuf,
    /// Name clients ask for; the folder's unless given
    #[arg(long)]
    name: Option<String>,
    /// Where OpenAI HTTP, /health and /metrics are served
    #[arg(long, default_value = "127.0.0.1:8080")]
    http: SocketAddr,
    /// Where gRPC is served
    #[arg(long, default_value = "127.0.0.1:8081")]
    grpc: SocketAddr,
    /// Ranks that each gang is split over
    #[arg(long, default_value_t = 1)]
    tensor: usize,
    /// Stages that the layers of each gang are split over, each of so many ranks
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
    /// Gangs that compute prompts
    #[arg(long, requires = "decode", conflicts_with = "unified")]
    prefill: Option<u16>,
    /// Gangs that generate from what prefill gangs computed
    #[arg(long, requires = "prefill", conflicts_with = "unified")]
    decode: Option<u16>,
    /// Gangs that do both; 1 unless given
    #[arg(long)]
    unified: Option<u16>,
    /// Of activations and KV: f32 or bf16
    #[arg(long, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Guess tokens from what the conversation has said before, and compute several at once; answers are the same
    #[arg(long, conflicts_with = "draft_model")]
    draft_lookup: bool,
    /// Guess tokens with this checkpoint: a smaller one with the same tokenizer
    #[arg(long)]
    draft_model: Option<PathBuf>,
    /// Tokens that are guessed ahead
    #[arg(long, default_value_t = DEFAULT_DRAFT_TOKENS)]
    draft_tokens: usize,
}

impl ServeArguments {
    fn drafts(&self) -> Option<Drafts> {
        let Self { draft_lookup, draft_model, draft_tokens, .. } = self;
        let model = draft_model.clone().map(DraftSource::Model);
        let source = model.or(draft_lookup.then_some(DraftSource::PromptLookup))?;
        Some(Drafts { source, tokens: *draft_tokens })
    }
}

/// Runs until a signal, or until a gang cannot go on.
pub(crate) fn run(arguments: ServeArguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let fleet = tokio::select! {
            fleet = Fleet::start(arguments) => fleet?,
            () = signals.next() => return Ok(()),
        };
        fleet.serve(signals).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

struct Fleet {
    gateway: Gateway,
    /// That requests get to end once the gateway shuts down.
    drain: Duration,
    workers: Vec<Worker>,
}

impl Fleet {
    async fn start(arguments: ServeArguments) -> anyhow::Result<Self> {
        let drafts = arguments.drafts();
        let ServeArguments {
            model_dir,
            name,
            http,
            grpc,
            tensor,
            pipeline,
            prefill,
            decode,
            unified,
            dtype,
            draft_lookup: _,
            draft_model,
            draft_tokens: _,
        } = arguments;
        let parallelism = Parallelism { tensor, pipeline };
        let roles = roles(prefill, decode, unified)?;
        let name = match name {
            Some(name) if !name.is_empty() => name,
            Some(_) => bail!("--name is empty"),
            None => folder_name(&model_dir)?,
        };
        // What can be refused is refused before minutes of loading.
        let (http, grpc) = (ReservedPort::reserve(http)?, ReservedPort::reserve(grpc)?);
        let config = read_config(&model_dir)?;
        let dir = model_dir.clone();
        // What a gateway needs of the folder, before minutes of loading weights.
        let read = tokio::task::spawn_blocking(move || text_model::read(&dir).map(drop)).await?;
        read.with_context(|| format!("cannot serve {}", model_dir.display()))?;
        let replicas = ShardPlan::new(&config, parallelism)?.kv_replicas();
        let kv_of = |config: &ModelConfig| (config.kv_bytes_per_token(dtype.bytes()) * BLOCK_TOKENS) as u64;
        let (mut weights, available) = (weight_bytes(&model_dir)?, free_memory());
        let mut block_bytes = kv_of(&config) * replicas as u64;
        if let Some(dir) = &draft_model {
            weights += weight_bytes(dir)?;
            block_bytes += kv_of(&read_config(dir)?);
        }
        let memory = available.unwrap_or(UNKNOWN_MEMORY).saturating_sub(roles.len() as u64 * weights);
        let kv_blocks = kv_blocks(config.context_length, block_bytes, memory, roles.len());
        if let Some(available) = available {
            let need = GangMemory { weights, kv: kv_blocks as u64 * block_bytes, block: block_bytes };
            eprintln!("{}", need.checked(roles.len() as u64, available)?);
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from).div_ceil(roles.len());

        let workers = try_join_all(roles.into_iter().map(|role| {
            let backend = CpuBackend {
                model_dir: model_dir.clone(),
                parallelism,
                dtype,
                kv: KvSize::Blocks(kv_blocks),
                threads: threads.max(parallelism.ranks()),
                isa: Isa::detect(),
            };
            let metrics = MetricOptions { model: name.clone(), ..MetricOptions::default() };
            let drafts = drafts.clone();
            let options = WorkerOptions::loopback(Backend::Cpu(backend));
            Worker::start(WorkerOptions { role, metrics, drafts, ..options })
        }))
        .await?;
        let gangs = workers
            .iter()
            .map(|worker| GangEndpoint { models: vec![name.clone()], leader: worker.endpoint().to_string() });
        let discovery = Arc::new(FixedFleet::new(gangs.collect()));
        let mut options = GatewayOptions::new(discovery, http, grpc);
        options.ready_within = Some(READY_WITHIN);
        let drain = options.limits.drain;
        let gateway = Gateway::start(options).await?;
        let addresses = gateway.addresses();
        let mut out = std::io::stdout();
        // Whoever started us may wait for this line, or have closed the pipe.
        let _ = writeln!(
            out,
            "serving {name}: OpenAI at http://{}/v1, gRPC at {}",
            addresses.http, addresses.grpc
        );
        let _ = out.flush();
        Ok(Self { gateway, drain, workers })
    }

    /// Serves until a signal, then lets what runs end, until another one.
    async fn serve(self, mut signals: StopSignals) -> anyhow::Result<()> {
        let Self { gateway, drain, mut workers } = self;
        let failed = async {
            let failures = workers.iter_mut().map(|worker| Box::pin(worker.failed()));
            select_all(failures).await.0
        };
        let failure = tokio::select! {
            error = failed => Some(error),
            () = signals.next() => None,
        };
        eprintln!("stopping: requests that run have {drain:?} to end; a second signal cuts them");
        tokio::select! {
            () = gateway.shutdown() => {}
            () = signals.next() => {}
        }
        join_all(workers.into_iter().map(|worker| async {
            // What the gateway has not waited for is cut.
            worker.drain(Some(Duration::ZERO)).await;
            worker.shutdown().await;
        }))
        .await;
        match failure {
            Some(error) => Err(error).context("a gang cannot go on"),
            None => Ok(()),
        }
    }
}

/// A role a gang.
fn roles(prefill: Option<u16>, decode: Option<u16>, unified: Option<u16>) -> anyhow::Result<Vec<Role>> {
    let counts = match (prefill, decode) {
        (Some(prefill), Some(decode)) => {
            vec![("--prefill", Role::Prefill, prefill), ("--decode", Role::Decode, decode)]
        }
        _ => vec![("--unified", Role::Unified, unified.unwrap_or(1))],
    };
    if let Some((option, ..)) = counts.iter().find(|(_, _, count)| *count == 0) {
        bail!("{option} must be at least 1");
    }
    Ok(counts.into_iter().flat_map(|(_, role, count)| vec![role; usize::from(count)]).collect())
}

fn folder_name(dir: &Path) -> anyhow::Result<String> {
    let full = dir.canonicalize().with_context(|| format!("model directory {}", dir.display()))?;
    let name = full.file_name().and_then(|name| name.to_str());
    Ok(name.with_context(|| format!("{} has no name of its own; give --name", dir.display()))?.to_owned())
}

fn read_config(dir: &Path) -> anyhow::Result<ModelConfig> {
    let path = dir.join("config.json");
    let config =
        std::fs::read(&path).with_context(|| format!("{} is no model: {}", dir.display(), path.display()))?;
    let generation = std::fs::read(dir.join("generation_config.json")).ok();
    ModelConfig::from_json(&config, generation.as_deref()).with_context(|| path.display().to_string())
}

/// Bytes that one gang takes.
struct GangMemory {
    weights: u64,
    kv: u64,
    /// The least KV there can be.
    block: u64,
}

impl GangMemory {
    /// What that many gangs take, in words; an error where it is not `available`.
    fn checked(&self, gangs: u64, available: u64) -> anyhow::Result<String> {
        let Self { weights, kv, block } = self;
        let total = gangs.saturating_mul(weights + kv);
        let need = format!(
            "{gangs} x ({} of weights + {} of KV) = {} of memory, {} available",
            mebibytes(*weights),
            mebibytes(*kv),
            mebibytes(total),
            mebibytes(available)
        );
        if total <= available {
            return Ok(need);
        }
        match available / (weights + block).max(1) {
            0 => bail!("not one gang of this model fits into memory: {need}"),
            fit => bail!("too many gangs for this machine's memory: {need}; at most {fit} fit"),
        }
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Bytes of the checkpoint's weights, about what they take in memory.
fn weight_bytes(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            bytes += std::fs::metadata(entry.path())?.len();
        }
    }
    Ok(bytes)
}

/// Bytes that can be had without swapping, where that is told.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// KV blocks of a gang: some full contexts, within its part of the memory; one block at least.
fn kv_blocks(context_length: usize, block_bytes: u64, memory: u64, gangs: usize) -> usize {
    let wanted = CONTEXTS * context_length.div_ceil(BLOCK_TOKENS);
    let affordable = memory / KV_SHARE / gangs as u64 / block_bytes.max(1);
    wanted.min(usize::try_from(affordable).unwrap_or(usize::MAX)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_holds_some_contexts_if_there_is_memory() {
        assert_eq!(kv_blocks(1000, 100, u64::MAX, 1), 8 * 16);
        assert_eq!(kv_blocks(1000, 100, 4000, 2), 10, "half of the memory, for two gangs");
        assert_eq!(kv_blocks(1000, 100, 0, 2), 1);
    }

    #[test]
    fn gangs_that_do_not_fit_are_refused() {
        let gang = GangMemory { weights: 100 << 20, kv: 20 << 20, block: 1 << 20 };
        let fits = gang.checked(2, 240 << 20).unwrap();
        assert_eq!(
            fits,
            "2 x (100.0 MiB of weights + 20.0 MiB of KV) = 240.0 MiB of memory, 240.0 MiB available"
        );
        let error = gang.checked(3, 303 << 20).unwrap_err().to_string();
        assert!(error.contains("too many gangs") && error.ends_with("at most 3 fit"), "{error}");
        let error = gang.checked(1, 100 << 20).unwrap_err().to_string();
        assert!(error.starts_with("not one gang"), "{error}");
    }

    #[test]
    fn a_fleet_is_unified_unless_told_otherwise() {
        assert_eq!(roles(None, None, None).unwrap(), [Role::Unified]);
        assert_eq!(roles(None, None, Some(2)).unwrap(), [Role::Unified; 2]);
        assert_eq!(roles(Some(1), Some(2), None).unwrap(), [Role::Prefill, Role::Decode, Role::Decode]);
        assert!(roles(Some(0), Some(2), None).unwrap_err().to_string().contains("--prefill"));
        assert!(roles(None, None, Some(0)).unwrap_err().to_string().contains("--unified"));
    }
}
