//! What guesses tokens ahead of the model, see [`herd_engine::Drafter`].

use std::path::PathBuf;
use std::sync::Arc;

use herd_engine::{CpuModel, CpuRanks, Drafter, LoadOptions};
use herd_model::Parallelism;

use crate::backend::Model;
use crate::bundle::vocabulary;
use crate::error::WorkerError;
use crate::options::{Backend, CpuBackend};

/// Guesses that a step computes for each sequence that generates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drafts {
    /// What guesses.
    pub source: DraftSource,
    /// Tokens ahead, at most; at least 1.
    pub tokens: usize,
}

/// What guesses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DraftSource {
    /// What the sequence itself has said before.
    PromptLookup,
    /// A smaller checkpoint with the same tokenizer. Its weights and its KV, of as many blocks as the model has, come on top of
    /// the model's. In a gang of several pods the leader's has it.
    Model(PathBuf),
}

/// Guesses ahead unless told otherwise: half of them right, more are hardly ever.
pub const DEFAULT_DRAFT_TOKENS: usize = 4;

/// What can be started with every epoch of a gang.
#[derive(Clone, Default)]
pub(crate) struct LoadedDrafts {
    source: Source,
    tokens: usize,
}

#[derive(Clone, Default)]
enum Source {
    #[default]
    Nothing,
    PromptLookup,
    Model(Arc<CpuRanks>),
}

impl std::fmt::Debug for LoadedDrafts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { source: _, tokens } = self;
        f.debug_struct("LoadedDrafts").field("tokens", tokens).finish_non_exhaustive()
    }
}

/// How to load a draft model beside a model: on one rank, with as many blocks, which block tables name for both.
#[derive(Debug)]
pub(crate) struct Beside {
    dir: PathBuf,
    backend: CpuBackend,
}

impl Drafts {
    /// None: there is no model to load.
    pub(crate) fn beside(&self, backend: &Backend) -> Result<Option<Beside>, WorkerError> {
        let DraftSource::Model(dir) = &self.source else { return Ok(None) };
        match backend {
            Backend::Cpu(backend) => Ok(Some(Beside { dir: dir.clone(), backend: backend.clone() })),
            Backend::Cuda | Backend::Fake(_) => Err(bad("draft models run on the cpu backend alone")),
        }
    }
}

impl LoadedDrafts {
    /// Loads what has to be.
    pub(crate) fn load(drafts: &Drafts, beside: Option<Beside>, model: &Model) -> Result<Self, WorkerError> {
        let source = match beside {
            None => Source::PromptLookup,
            Some(beside) => Source::Model(Arc::new(beside.load(model)?)),
        };
        Ok(Self { source, tokens: drafts.tokens })
    }

    /// Guesses ahead; 0: there are none.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// For an engine that starts.
    pub(crate) fn drafter(&self) -> Result<Option<Drafter>, WorkerError> {
        match &self.source {
            Source::Nothing => Ok(None),
            Source::PromptLookup => Ok(Some(Drafter::PromptLookup)),
            Source::Model(ranks) => {
                let model = CpuModel::start(Arc::clone(ranks))?;
                Ok(Some(Drafter::Model(Box::new(model))))
            }
        }
    }
}

impl Beside {
    fn load(self, model: &Model) -> Result<CpuRanks, WorkerError> {
        let Self { dir, backend: CpuBackend { model_dir, parallelism: _, dtype, kv: _, threads, isa } } =
            self;
        let own = vocabulary(&model_dir).map_err(|problem| bad(format!("the model's {problem}")))?;
        let theirs = vocabulary(&dir).map_err(|problem| bad(format!("{}: {problem}", dir.display())))?;
        if own != theirs {
            let problem = format!("{} has another vocabulary than {}", dir.display(), model_dir.display());
            return Err(bad(problem));
        }
        let options = LoadOptions {
            parallelism: Parallelism::tensor(1),
            dtype,
            kv_blocks: model.kv_blocks,
            host_blocks: model.host_blocks,
            threads,
            isa,
        };
        let ranks = CpuRanks::load(&dir, &options, 0..1)?;
        tracing::info!(digest = ranks.info().digest, "draft model loaded");
        Ok(ranks)
    }
}

fn bad(problem: impl Into<String>) -> WorkerError {
    WorkerError::Option { option: "--draft-model", problem: problem.into() }
}
