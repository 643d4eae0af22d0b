//! Ranks of a model on this machine's CPU, a thread each, that are handed step plans: all of a model's, or those of one pod
//! of a gang of several.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::{io, thread};

use herd_model::{Dtype, Fp8, ModelConfig, Parallelism, RankShard, ShardError, ShardPlan, kv_fingerprint};
use herd_scheduler::StepPlan;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::batch::Batch;
use super::isa::Isa;
use super::linear::Numerics;
use super::load::Loader;
use super::memory::Arena;
use super::pages::{PageLayout, Pages};
use super::rank::{Kv, Rank, Weights, Work};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::clipped::RowsClipped;
use crate::collective::{Collective, GIVEN_AHEAD, LocalRank};
use crate::{Executor, ExecutorError, KvStore, StepOutput};

/// Rows of a batch that a step of a pipeline is cut into, at least: below, the time of a batch hardly follows its rows.
const SPLIT_ROWS: usize = 64;

/// How to load a model.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Ranks the model is split over.
    pub parallelism: Parallelism,
    /// Of activations that enter bf16 weights, and of the KV cache.
    pub dtype: Dtype,
    /// Blocks of KV each rank has.
    pub kv_blocks: usize,
    /// Blocks of KV each rank has room for beside those, for preempted sequences.
    pub host_blocks: usize,
    /// Threads that compute, over all ranks; each rank has at least one.
    pub threads: usize,
    /// Instructions that compute.
    pub isa: Isa,
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
    /// Slots of the host pool of each rank.
    pub host_blocks: usize,
    /// Bytes of packed weights, by rank of those that are here.
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
    #[error("thread of rank {rank} does not start: {source}")]
    Thread {
        /// Of which rank.
        rank: usize,
        /// Why.
        source: io::Error,
    },
    /// A rank's thread ended while it loaded.
    #[error("rank {rank} ended while it loaded")]
    RankEnded {
        /// Which one.
        rank: usize,
    },
}

/// Ranks of a Llama model, loaded: their weights and KV caches. They compute when they are started.
pub struct CpuRanks {
    info: ModelInfo,
    inverse_frequencies: Vec<f32>,
    ranks: Vec<Arc<Rank>>,
    threads_per_rank: usize,
}

/// One rank's columns of the logits that a step wants.
#[derive(Clone, Debug, PartialEq)]
pub struct Columns {
    /// Whose.
    pub rank: usize,
    /// `[rows wanted, vocabulary of the rank]`.
    pub logits: Vec<f32>,
}

/// Ranks that compute, a thread each, from their start until one fails or they are dropped.
pub struct RunningRanks {
    info: ModelInfo,
    inverse_frequencies: Vec<f32>,
    first: usize,
    ranks: Vec<RankThread>,
    /// Why they are over.
    failed: Option<(usize, String)>,
}

/// A whole Llama model on the CPU: all ranks are threads of this process.
pub struct CpuModel {
    ranks: Arc<CpuRanks>,
    running: RunningRanks,
}

/// A rank's thread and the leader's ends of its channels. Ends and is joined when dropped.
struct RankThread {
    /// None while it is being dropped.
    batches: Option<SyncSender<Arc<[Batch]>>>,
    logits: Receiver<Result<Vec<f32>, String>>,
    thread: Option<JoinHandle<()>>,
}

impl CpuModel {
    /// Loads a checkpoint and starts all of its ranks.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        Self::start(Arc::new(CpuRanks::load(dir, options, 0..options.parallelism.ranks())?))
    }

    /// Starts all ranks of a model, which have been loaded and do not run.
    pub fn start(ranks: Arc<CpuRanks>) -> Result<Self, LoadError> {
        let running = ranks.start(LocalRank::gang(ranks.info().shards.parallelism()))?;
        Ok(Self { ranks, running })
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        self.ranks.info()
    }

    /// See [`CpuRanks::rows_clipped`].
    pub fn rows_clipped(&self) -> RowsClipped {
        self.ranks.rows_clipped()
    }
}

impl CpuRanks {
    /// Loads the ranks `local` of a checkpoint: each reads its own slices.
    pub fn load(dir: &Path, options: &LoadOptions, local: Range<usize>) -> Result<Self, LoadError> {
        let &LoadOptions { parallelism, dtype, kv_blocks, host_blocks, threads, isa } = options;
        let checkpoint = Checkpoint::open(dir)?;
        let config = checkpoint.config().clone();
        let shards = ShardPlan::new(&config, parallelism)?;
        let bytes_per_block = config.kv_bytes_per_token(dtype.bytes()) * herd_model::BLOCK_TOKENS;
        let all_blocks = kv_blocks.saturating_add(host_blocks);
        if kv_blocks == 0
            || all_blocks > u32::MAX as usize
            || all_blocks > (isize::MAX as usize) / bytes_per_block
        {
            let problem = "there has to be at least one block, and all of them have to fit an address space";
            return Err(LoadError::Option { option: "kv_blocks", value: kv_blocks, problem });
        }
        if threads == 0 {
            let problem = "there has to be at least one thread";
            return Err(LoadError::Option { option: "threads", value: threads, problem });
        }
        if local.is_empty() || local.end > parallelism.ranks() {
            let problem = "the ranks of a process are some of all ranks";
            return Err(LoadError::Option { option: "ranks", value: local.end, problem });
        }
        let activation_scale_ub = config.quantization.as_ref().map_or(f32::INFINITY, Fp8::input_bound);
        let numerics = Numerics { isa, dtype, activation_scale_ub };
        // One rank of each stage counts: the others see the same rows.
        let clipped = RowsClipped::default();
        let counting = local.start % parallelism.tensor;
        let threads_per_rank = threads / local.len();
        let loading = thread::scope(|scope| {
            let loading: Vec<_> = shards.ranks()[local.clone()]
                .iter()
                .map(|shard| {
                    let checkpoint = &checkpoint;
                    let counts = shard.tensor_rank == counting;
                    let clipped = if counts { clipped.clone() } else { RowsClipped::default() };
                    scope.spawn(move || {
                        let blocks = (kv_blocks, host_blocks);
                        let load = || Rank::load(checkpoint, shard, numerics, blocks, clipped);
                        let pool = pool(shard.rank, threads_per_rank)?;
                        Ok::<_, LoadError>(pool.map_or_else(load.clone(), |pool| pool.install(load))?)
                    })
                })
                .collect();
            loading.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        let ranks = local
            .clone()
            .zip(loading)
            .map(|(rank, loaded)| Ok(Arc::new(loaded.map_err(|_| LoadError::RankEnded { rank })??)))
            .collect::<Result<Vec<_>, LoadError>>()?;
        let digest = checkpoint.digest()?;
        Ok(Self {
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            info: ModelInfo {
                kv_fingerprint: kv_fingerprint(&digest, dtype, isa.numerics()),
                config,
                shards,
                digest,
                kv_blocks,
                host_blocks,
                weight_bytes_per_rank: ranks.iter().map(|rank| rank.weights.bytes() as u64).collect(),
            },
            threads_per_rank,
            ranks,
        })
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Rows that one rank of each stage that is here clipped, over all their starts.
    pub fn rows_clipped(&self) -> RowsClipped {
        self.ranks.first().map_or_else(RowsClipped::default, |rank| rank.clipped.clone())
    }

    /// The KV cache of each rank that is here, by rank.
    pub fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.ranks.iter().map(|rank| rank.kv_store()).collect()
    }

    /// Starts them as members of a group; `ends` are theirs, by rank. What an earlier start left in the KV caches is not to be
    /// trusted.
    pub fn start(&self, ends: Vec<LocalRank>) -> Result<RunningRanks, LoadError> {
        let first = ends.first().map_or(0, Collective::rank);
        let ranks = self.ranks.iter().zip(ends);
        let ranks = ranks.map(|(rank, end)| RankThread::spawn(Arc::clone(rank), end, self.threads_per_rank));
        Ok(RunningRanks {
            info: self.info.clone(),
            inverse_frequencies: self.inverse_frequencies.clone(),
            first,
            ranks: ranks.collect::<Result<_, _>>()?,
            failed: None,
        })
    }
}

impl Rank {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        shard: &RankShard,
        numerics: Numerics,
        blocks: (usize, usize),
        clipped: RowsClipped,
    ) -> Result<Self, CheckpointError> {
        let arena = Arena::default();
        let weights = Loader { checkpoint, shard, clipped: &clipped, arena: &arena }.weights()?;
        Ok(Self::new(checkpoint.config(), shard, numerics, blocks, clipped, weights))
    }

    /// With an empty cache.
    pub(super) fn new(
        config: &ModelConfig,
        shard: &RankShard,
        numerics: Numerics,
        (kv_blocks, host_blocks): (usize, usize),
        clipped: RowsClipped,
        weights: Weights,
    ) -> Self {
        let (config, shard) = (config.clone(), shard.clone());
        let layout = PageLayout {
            blocks: kv_blocks,
            host_blocks,
            layers: shard.layers.clone(),
            heads: shard.kv_heads.clone(),
            head_dim: config.head_dim,
        };
        let kv = match numerics.dtype {
            Dtype::F32 => Kv::F32(Arc::new(Pages::new(layout))),
            Dtype::Bf16 => Kv::Bf16(Arc::new(Pages::new(layout))),
        };
        Self { config, shard, numerics, weights, clipped, kv }
    }
}

impl RankThread {
    fn spawn(rank: Arc<Rank>, group: LocalRank, threads: usize) -> Result<Self, LoadError> {
        let number = group.rank();
        let pool = pool(number, threads)?;
        let (batches, incoming) = sync_channel(1);
        let (outgoing, logits) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("rank {number}"))
            .spawn(move || run(&rank, &group, pool.as_ref(), &incoming, &outgoing))
            .map_err(|source| LoadError::Thread { rank: number, source })?;
        Ok(Self { batches: Some(batches), logits, thread: Some(thread) })
    }
}

/// The threads of a rank. One with one thread needs no pool: it computes where it is.
fn pool(rank: usize, threads: usize) -> Result<Option<ThreadPool>, LoadError> {
    let name = move |thread| format!("rank {rank}.{thread}");
    let build = || ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
    let pool = (threads > 1).then(build).transpose();
    pool.map_err(|error| LoadError::Thread { rank, source: io::Error::other(error) })
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
    batches: &Receiver<Arc<[Batch]>>,
    logits: &SyncSender<Result<Vec<f32>, String>>,
) {
    let _ends_group = EndsGroup(group);
    let mut work = Work::default();
    while let Ok(batches) = batches.recv() {
        let mut forward = || rank.forward(&batches, group, &mut work);
        let result = match pool {
            Some(pool) => pool.install(&mut forward),
            None => forward(),
        };
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

impl RunningRanks {
    /// Runs one step on all ranks that are here, to its end; the ranks of other processes have to run it too. An error ends
    /// the ranks.
    pub fn step(&mut self, plan: &StepPlan) -> Result<Vec<Columns>, ExecutorError> {
        if let Some((rank, message)) = self.failed.clone() {
            return Err(ExecutorError::RankStopped { rank, message });
        }
        let blocks = (self.info.kv_blocks, self.info.host_blocks);
        let batch = Batch::new(plan, &self.info.config, &self.inverse_frequencies, blocks)
            .map_err(ExecutorError::BadPlan)?;
        if batch.rows() == 0 && batch.moves.is_empty() {
            return Ok(Vec::new());
        }
        let parts = self.parts(batch.rows());
        let batches = batch.split(parts).into();
        self.run(&batches).map_err(|(rank, message)| {
            self.failed = Some((rank, message.clone()));
            ExecutorError::RankStopped { rank, message }
        })
    }

    /// Into how many batches a step is cut: while a stage computes one, the stage before computes the next. It pays where the
    /// time of a batch follows its rows; one of few rows takes as long as reading the weights, each time.
    fn parts(&self, rows: usize) -> usize {
        match self.info.shards.parallelism().pipeline {
            1 => 1,
            _ => (rows / SPLIT_ROWS).clamp(1, GIVEN_AHEAD),
        }
    }

    fn run(&self, given: &Arc<[Batch]>) -> Result<Vec<Columns>, (usize, String)> {
        let ranks = || (self.first..).zip(&self.ranks);
        for (rank, thread) in ranks() {
            if thread.batches.as_ref().is_none_or(|batches| batches.send(Arc::clone(given)).is_err()) {
                return Err((rank, "its thread ended".to_owned()));
            }
        }
        // All ranks answer, also after one failed: none is left in the step.
        let answers: Vec<_> = ranks().map(|(rank, thread)| (rank, thread.logits.recv())).collect();
        answers
            .into_iter()
            .map(|(rank, answer)| {
                let ended = |RecvError| (rank, "its thread ended".to_owned());
                let logits = answer.map_err(ended)?.map_err(|message| (rank, message))?;
                Ok(Columns { rank, logits })
            })
            .collect()
    }
}

impl ModelInfo {
    /// Whole rows of logits from the columns of the ranks of the last stage.
    ///
    /// # Errors
    /// Columns that are missing, or of another number of rows.
    pub fn rows_of_logits(&self, columns: &[Columns]) -> Result<Vec<f32>, ExecutorError> {
        let vocab = self.config.vocab_size;
        let shards = self.shards.stage(self.shards.parallelism().pipeline - 1);
        let of = |rank: usize| columns.iter().find(|columns| columns.rank == rank);
        let rows = shards
            .first()
            .map_or(0, |first| of(first.rank).map_or(0, |columns| columns.logits.len() / first.vocab.len()));
        let mut logits = vec![0.0; rows * vocab];
        for shard in shards {
            let given = of(shard.rank).map_or(&[][..], |columns| &columns.logits);
            if given.len() != rows * shard.vocab.len() {
                let message = format!("gave {} logits for {rows} rows", given.len());
                return Err(ExecutorError::RankStopped { rank: shard.rank, message });
            }
            let rows = logits.chunks_exact_mut(vocab).zip(given.chunks_exact(shard.vocab.len()));
            rows.for_each(|(row, columns)| row[shard.vocab.clone()].copy_from_slice(columns));
        }
        Ok(logits)
    }
}

impl Executor for CpuModel {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        let columns = self.running.step(plan)?;
        Ok(StepOutput { logits: self.ranks.info.rows_of_logits(&columns)? })
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.ranks.kv()
    }

    fn vocab_size(&self) -> usize {
        self.ranks.info.config.vocab_size
    }
}
