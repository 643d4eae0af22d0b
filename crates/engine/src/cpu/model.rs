//! All ranks of a model on this machine's CPU: a thread a rank, and the leader that hands them step plans.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::{io, thread};

use herd_model::{Dtype, ModelConfig, ShardError, ShardPlan, kv_fingerprint};
use herd_scheduler::StepPlan;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::batch::Batch;
use super::isa::Isa;
use super::linear::Numerics;
use super::load::Loader;
use super::pages::{PageLayout, Pages};
use super::rank::{Kv, Rank};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::collective::{Collective, InProcess};
use crate::{Executor, ExecutorError, KvStore, StepOutput};

/// How to load a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Ranks the model is split over.
    pub tensor: usize,
    /// Of activations that enter bf16 weights, and of the KV cache.
    pub dtype: Dtype,
    /// Blocks of KV each rank has.
    pub kv_blocks: usize,
    /// Threads that compute, over all ranks; each rank has at least one.
    pub threads: usize,
}

/// What a loaded model is.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Of the checkpoint.
    pub config: ModelConfig,
    /// What each rank holds.
    pub shards: ShardPlan,
    /// The model digest.
    pub digest: String,
    /// Equal where KV may be exchanged.
    pub kv_fingerprint: String,
    /// Blocks of KV each rank has.
    pub kv_blocks: usize,
    /// Bytes of packed weights, by rank.
    pub weight_bytes_per_rank: Vec<u64>,
}

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// See [`CheckpointError`].
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// See [`ShardError`].
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// An option that makes no sense.
    #[error("{option} is {value}; {problem}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Given.
        value: usize,
        /// What it may be.
        problem: &'static str,
    },
    /// No more threads.
    #[error("thread of tensor rank {rank} does not start: {source}")]
    Thread {
        /// Of which rank.
        rank: usize,
        /// Why.
        source: io::Error,
    },
    /// A rank's thread ended while it loaded.
    #[error("tensor rank {rank} ended while it loaded")]
    RankEnded {
        /// Which one.
        rank: usize,
    },
}

/// A Llama model on the CPU.
pub struct CpuModel {
    info: ModelInfo,
    inverse_frequencies: Vec<f32>,
    kv: Vec<Arc<dyn KvStore>>,
    ranks: Vec<RankThread>,
    /// Why the epoch is over.
    failed: Option<(usize, String)>,
}

/// A rank's thread and the leader's ends of its channels. Ends and is joined when dropped.
struct RankThread {
    /// None while it is being dropped.
    batches: Option<SyncSender<Arc<Batch>>>,
    logits: Receiver<Result<Vec<f32>, String>>,
    thread: Option<JoinHandle<()>>,
}

impl CpuModel {
    /// Loads a checkpoint: each rank reads its own slices.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let &LoadOptions { tensor, dtype, kv_blocks, threads } = options;
        let checkpoint = Checkpoint::open(dir)?;
        let config = checkpoint.config().clone();
        let shards = ShardPlan::new(&config, tensor)?;
        let bytes_per_block = config.kv_bytes_per_token(dtype.bytes()) * herd_model::BLOCK_TOKENS;
        if kv_blocks == 0
            || kv_blocks > u32::MAX as usize
            || kv_blocks > (isize::MAX as usize) / bytes_per_block
        {
            let problem = "there has to be at least one block, and all of them have to fit an address space";
            return Err(LoadError::Option { option: "kv_blocks", value: kv_blocks, problem });
        }
        if threads == 0 {
            let problem = "there has to be at least one thread";
            return Err(LoadError::Option { option: "threads", value: threads, problem });
        }
        let isa = Isa::detect();
        let activation_scale_ub =
            config.quantization.as_ref().map_or(f32::INFINITY, |fp8| fp8.activation_scale_ub);
        let numerics = Numerics { isa, dtype, activation_scale_ub };
        let loading = thread::scope(|scope| {
            let loading: Vec<_> = (0..tensor)
                .map(|rank| {
                    let (checkpoint, shards) = (&checkpoint, &shards);
                    scope.spawn(move || Rank::load(checkpoint, shards, rank, numerics, kv_blocks))
                })
                .collect();
            loading.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        let mut ranks = Vec::new();
        let mut kv = Vec::new();
        let mut weight_bytes_per_rank = Vec::new();
        for (rank, (loaded, group)) in loading.into_iter().zip(InProcess::group(tensor)).enumerate() {
            let loaded = loaded.map_err(|_| LoadError::RankEnded { rank })??;
            kv.push(loaded.kv_store());
            weight_bytes_per_rank.push(loaded.weights.bytes() as u64);
            ranks.push(RankThread::spawn(loaded, group, threads / tensor)?);
        }
        let digest = checkpoint.digest()?;
        Ok(Self {
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            info: ModelInfo {
                kv_fingerprint: kv_fingerprint(&digest, dtype, isa.numerics()),
                config,
                shards,
                digest,
                kv_blocks,
                weight_bytes_per_rank,
            },
            kv,
            ranks,
            failed: None,
        })
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }
}

impl Rank {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        shards: &ShardPlan,
        rank: usize,
        numerics: Numerics,
        kv_blocks: usize,
    ) -> Result<Self, CheckpointError> {
        let config = checkpoint.config().clone();
        let shard = shards.ranks()[rank].clone();
        let weights = Loader { checkpoint, shard: &shard }.weights()?;
        let layout = PageLayout {
            blocks: kv_blocks,
            layers: config.layers,
            heads: shard.kv_heads.clone(),
            head_dim: config.head_dim,
        };
        let kv = match numerics.dtype {
            Dtype::F32 => Kv::F32(Arc::new(Pages::new(layout))),
            Dtype::Bf16 => Kv::Bf16(Arc::new(Pages::new(layout))),
        };
        Ok(Self { config, shard, numerics, weights, kv })
    }
}

impl RankThread {
    fn spawn(rank: Rank, group: InProcess, threads: usize) -> Result<Self, LoadError> {
        let number = group.rank();
        let failed = |source| LoadError::Thread { rank: number, source };
        // A rank with one thread needs no pool: it computes where it is.
        let pool = (threads > 1)
            .then(|| {
                let name = move |thread| format!("rank {number}.{thread}");
                ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build()
            })
            .transpose()
            .map_err(|error| failed(io::Error::other(error)))?;
        let (batches, incoming) = sync_channel(1);
        let (outgoing, logits) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("rank {number}"))
            .spawn(move || run(&rank, &group, pool.as_ref(), &incoming, &outgoing))
            .map_err(failed)?;
        Ok(Self { batches: Some(batches), logits, thread: Some(thread) })
    }
}

/// Ends the group when a rank's thread ends, however it ends: no other rank waits for it.
struct EndsGroup<'a>(&'a dyn Collective);

impl Drop for EndsGroup<'_> {
    fn drop(&mut self) {
        self.0.abort("its thread ended");
    }
}

fn run(
    rank: &Rank,
    group: &dyn Collective,
    pool: Option<&ThreadPool>,
    batches: &Receiver<Arc<Batch>>,
    logits: &SyncSender<Result<Vec<f32>, String>>,
) {
    let _ends_group = EndsGroup(group);
    while let Ok(batch) = batches.recv() {
        let forward = || rank.forward(&batch, group);
        let result = pool.map_or_else(forward, |pool| pool.install(forward));
        let over = result.is_err();
        if logits.send(result.map_err(|error| error.to_string())).is_err() || over {
            return;
        }
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing more to say: what it failed with, a step has reported.
            let _ = thread.join();
        }
    }
}

impl Executor for CpuModel {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        if let Some((rank, message)) = self.failed.clone() {
            return Err(ExecutorError::RankStopped { rank, message });
        }
        let batch = Batch::new(plan, &self.info.config, &self.inverse_frequencies, self.info.kv_blocks)
            .map_err(ExecutorError::BadPlan)?;
        if batch.rows() == 0 {
            return Ok(StepOutput::default());
        }
        self.run(&Arc::new(batch)).map_err(|(rank, message)| {
            self.failed = Some((rank, message.clone()));
            ExecutorError::RankStopped { rank, message }
        })
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.kv.clone()
    }

    fn vocab_size(&self) -> usize {
        self.info.config.vocab_size
    }
}

impl CpuModel {
    fn run(&self, batch: &Arc<Batch>) -> Result<StepOutput, (usize, String)> {
        for (rank, thread) in self.ranks.iter().enumerate() {
            if thread.batches.as_ref().is_none_or(|batches| batches.send(Arc::clone(batch)).is_err()) {
                return Err((rank, "its thread ended".to_owned()));
            }
        }
        // All ranks answer, also after one failed: none is left in the step.
        let answers: Vec<_> = self.ranks.iter().map(|rank| rank.logits.recv()).collect();
        let vocab = self.info.config.vocab_size;
        let mut logits = vec![0.0; batch.logit_rows.len() * vocab];
        for (answer, shard) in answers.into_iter().zip(self.info.shards.ranks()) {
            let columns = answer
                .map_err(|RecvError| (shard.rank, "its thread ended".to_owned()))?
                .map_err(|message| (shard.rank, message))?;
            let rows = logits.chunks_exact_mut(vocab).zip(columns.chunks_exact(shard.vocab.len()));
            rows.for_each(|(row, columns)| row[shard.vocab.clone()].copy_from_slice(columns));
        }
        Ok(StepOutput { logits })
    }
}
