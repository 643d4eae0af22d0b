//! From options to an executor and what has to be known about its model.

use std::path::PathBuf;
use std::sync::Arc;

use herd_engine::{
    Checkpoint, CpuModel, CpuRanks, Executor, FakeOptions, KvStore, LoadError, LoadOptions, ModelInfo,
    RowsClipped,
};
use herd_model::{
    BLOCK_TOKENS, Dtype, FileDigest, ModelConfig, Parallelism, ShardPlan, kv_fingerprint, model_digest,
};

use crate::drafts::LoadedDrafts;
use crate::error::WorkerError;
use crate::grammars::Grammars;
use crate::lease::Transfers;
use crate::metrics::Metrics;
use crate::options::{Backend, CpuBackend, FakeBackend, GangPart, KvSize, WorkerLimits};
use crate::transfer::{Outgoing, Receiver, Store};

/// What a worker knows about the model it serves.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) shards: ShardPlan,
    pub(crate) digest: String,
    pub(crate) kv_fingerprint: String,
    pub(crate) dtype: Dtype,
    /// Of every rank.
    pub(crate) kv_blocks: usize,
    /// Slots of the host pool of every rank.
    pub(crate) host_blocks: usize,
    pub(crate) block_tokens: usize,
    /// Where the bundle's files are.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) drafts: LoadedDrafts,
    /// Counted by the first rank of this process.
    pub(crate) clipped: RowsClipped,
}

impl Model {
    /// KV of a prompt on its way to another gang: a transfer, and the epoch of the gang that receives it.
    pub(crate) fn outgoing(
        &self,
        (transfer, epoch): (u64, u64),
        prompt_tokens: usize,
        blocks: Arc<[u32]>,
    ) -> Outgoing {
        Outgoing {
            transfer,
            epoch,
            fingerprint: self.kv_fingerprint.clone(),
            dtype: self.dtype,
            block_tokens: self.block_tokens,
            prompt_tokens,
            blocks,
        }
    }

    /// What takes KV for a rank, whose number in its process is `local`.
    pub(crate) fn receiver(
        &self,
        (rank, local): (u16, usize),
        epoch: u64,
        store: Arc<dyn KvStore>,
        transfers: &Arc<Transfers>,
        metrics: &Arc<Metrics>,
    ) -> Receiver {
        Receiver {
            rank,
            local,
            epoch,
            fingerprint: self.kv_fingerprint.clone(),
            dtype: self.dtype,
            block_tokens: self.block_tokens,
            store: Store(store),
            transfers: Arc::clone(transfers),
            metrics: Arc::clone(metrics),
        }
    }
}

/// Loads the model. Takes as long as reading the weights does.
pub(crate) fn load(
    backend: Backend,
    limits: &WorkerLimits,
) -> Result<(Box<dyn Executor>, Model), WorkerError> {
    match backend {
        Backend::Cpu(cpu) => {
            let options = load_options(&cpu, cpu.parallelism.ranks(), limits)?;
            let model = CpuModel::load(&cpu.model_dir, &options)?;
            let info = about(&cpu, model.info(), model.rows_clipped());
            Ok((Box::new(model), info))
        }
        Backend::Cuda => Err(cuda()),
        Backend::Fake(fake) => load_fake(*fake),
    }
}

/// Loads the ranks that one process of a gang of several has.
pub(crate) fn load_part(
    backend: Backend,
    limits: &WorkerLimits,
    part: &GangPart,
) -> Result<(CpuRanks, Model), WorkerError> {
    match backend {
        Backend::Cpu(cpu) => {
            part.check(cpu.parallelism)?;
            let local = part.ranks();
            let options = load_options(&cpu, local.len(), limits)?;
            let ranks = CpuRanks::load(&cpu.model_dir, &options, local)?;
            let info = about(&cpu, ranks.info(), ranks.rows_clipped());
            Ok((ranks, info))
        }
        Backend::Cuda => Err(cuda()),
        Backend::Fake(_) => {
            let problem = "the fake backend has all ranks in one process".to_owned();
            Err(WorkerError::Option { option: "--first-rank", problem })
        }
    }
}

/// Why the devices there are cannot be used.
fn cuda() -> WorkerError {
    match herd_engine::cuda_devices() {
        Ok(devices) => {
            let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
            WorkerError::BackendNotSupported { devices: devices.join(", ") }
        }
        Err(error) => error.into(),
    }
}

/// `local`: ranks in this process.
fn load_options(
    backend: &CpuBackend,
    local: usize,
    limits: &WorkerLimits,
) -> Result<LoadOptions, WorkerError> {
    let &CpuBackend { ref model_dir, parallelism, dtype, kv, threads, isa } = backend;
    let kv_blocks = match kv {
        KvSize::Blocks(blocks) => blocks,
        KvSize::Bytes(bytes) => {
            let checkpoint = Checkpoint::open(model_dir).map_err(LoadError::from)?;
            // As much for each rank as if all of them were here.
            let bytes = bytes.saturating_mul(parallelism.ranks() as u64) / (local as u64).max(1);
            kv_blocks(checkpoint.config(), parallelism, dtype, bytes, limits)?
        }
    };
    Ok(LoadOptions { parallelism, dtype, kv_blocks, host_blocks: limits.kv_host_blocks, threads, isa })
}

fn about(backend: &CpuBackend, info: &ModelInfo, clipped: RowsClipped) -> Model {
    let CpuBackend { model_dir, dtype, .. } = backend;
    let ModelInfo { config, shards, digest, kv_fingerprint, kv_blocks, host_blocks, weight_bytes_per_rank } =
        info.clone();
    tracing::info!(digest, kv_fingerprint, kv_blocks, ?weight_bytes_per_rank, "model loaded");
    let bundle = Some(model_dir.clone());
    Model {
        config,
        shards,
        digest,
        kv_fingerprint,
        dtype: *dtype,
        kv_blocks,
        host_blocks,
        block_tokens: BLOCK_TOKENS,
        grammars: Arc::new(Grammars::new(bundle.clone())),
        drafts: LoadedDrafts::default(),
        bundle,
        clipped,
    }
}

/// Blocks that fit into `bytes` over all ranks of a gang, and no more than all sequences together can fill.
fn kv_blocks(
    config: &ModelConfig,
    parallelism: Parallelism,
    dtype: Dtype,
    bytes: u64,
    limits: &WorkerLimits,
) -> Result<usize, WorkerError> {
    let replicas = ShardPlan::new(config, parallelism)?.kv_replicas();
    let block_bytes = config.kv_bytes_per_token(dtype.bytes()) * BLOCK_TOKENS * replicas;
    let blocks = usize::try_from(bytes).unwrap_or(usize::MAX) / block_bytes;
    if blocks == 0 {
        let problem = format!("{bytes} bytes do not hold one block, which takes {block_bytes}");
        return Err(WorkerError::Option { option: "--kv-memory", problem });
    }
    let context_length = limits.context_length.unwrap_or(config.context_length);
    Ok(blocks.min(limits.max_sequences.saturating_mul(context_length.div_ceil(BLOCK_TOKENS)).max(1)))
}

/// A configuration whose KV heads split as the fake backend splits them, and an identity that follows from the options.
fn load_fake(backend: FakeBackend) -> Result<(Box<dyn Executor>, Model), WorkerError> {
    let FakeBackend { model, options, context_length, bundle } = backend;
    let FakeOptions {
        vocab_size,
        tensor,
        layers,
        kv_heads,
        row_bytes,
        kv_blocks,
        host_blocks,
        block_tokens,
        seed,
        ..
    } = options;
    let config = serde_json::json!({
        "model_type": "llama",
        "hidden_size": 64,
        // Room for any degree that tests ask for.
        "intermediate_size": 1 << 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 48 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": (row_bytes / Dtype::F32.bytes()).next_multiple_of(2).max(2),
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": context_length,
    });
    let config = ModelConfig::from_json(config.to_string().as_bytes(), None)?;
    let shape =
        [vocab_size, layers, kv_heads, row_bytes, block_tokens].map(|part| part.to_string()).join("x");
    let digest = model_digest(&[FileDigest { path: format!("fake/{shape}"), size: seed, sha256: [0; 32] }]);
    let model_info = Model {
        shards: ShardPlan::new(&config, Parallelism::tensor(tensor))?,
        kv_fingerprint: kv_fingerprint(&digest, Dtype::F32, "fake"),
        config,
        digest,
        dtype: Dtype::F32,
        kv_blocks,
        host_blocks,
        block_tokens,
        grammars: Arc::new(Grammars::new(bundle.clone())),
        drafts: LoadedDrafts::default(),
        bundle,
        clipped: RowsClipped::default(),
    };
    Ok((Box::new(model), model_info))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_memory_is_a_bound_and_so_is_what_sequences_can_fill() {
        let (_, model) = load_fake(FakeBackend::new(FakeOptions::default(), 1000)).unwrap();
        let config = model.config;
        let block = (config.kv_bytes_per_token(4) * BLOCK_TOKENS) as u64;
        let limits = WorkerLimits { max_sequences: 2, ..WorkerLimits::default() };
        let blocks =
            |tensor, bytes| kv_blocks(&config, Parallelism::tensor(tensor), Dtype::F32, bytes, &limits);
        assert_eq!(blocks(1, 5 * block + 1).unwrap(), 5);
        // Four KV heads on eight ranks: each twice.
        assert_eq!(blocks(8, 5 * block).unwrap(), 2);
        assert_eq!(blocks(1, 1000 * block).unwrap(), 2 * 16);
        assert!(blocks(1, block - 1).unwrap_err().to_string().starts_with("--kv-memory: "));
        assert_eq!(blocks(5, block).unwrap_err().reason(), "ImpossibleParallelism");
    }
}
