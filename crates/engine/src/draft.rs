//! Speculative decoding: guesses at the tokens that come next, which a step computes together with the token they follow. One is
//! kept only where it is the token that is sampled there anyway, under (seed, choice, position): what comes out is the same with
//! and without, and a bad guess costs time alone.

mod lookup;
mod model;

use herd_scheduler::{Limits, Move, StepEntry};

use self::model::DraftModel;
use crate::{Executor, ExecutorError, History, Sampling};

/// What guesses.
pub enum Drafter {
    /// Prompt lookup: what followed the last time that the sequence said the same (Saxena 2023).
    PromptLookup,
    /// A smaller model with the same vocabulary (Leviathan, Kalman and Matias 2023).
    Model(Box<dyn Executor>),
}

/// A sequence of a step, and how many tokens are to be guessed for it.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) entry: &'a StepEntry,
    /// None for most of those whose prompt is computed.
    pub(crate) room: usize,
    /// Prompt and generated; those of the entry are among them.
    pub(crate) tokens: &'a [u32],
    /// Positions from the first on whose KV the draft model has. At most as many as come before the entry.
    pub(crate) computed: usize,
    pub(crate) sampling: &'a Sampling,
    /// Of the token that is sampled after the entry.
    pub(crate) position: usize,
    pub(crate) history: Option<&'a History>,
}

/// What is guessed for a sequence.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Draft {
    pub(crate) tokens: Vec<u32>,
    /// Positions whose KV the draft model has now; those of tokens that are not sampled are of no use.
    pub(crate) computed: usize,
}

/// A drafter at work.
pub(crate) enum Drafting {
    PromptLookup,
    Model(DraftModel),
}

impl Drafting {
    /// For an engine of these limits.
    pub(crate) fn new(drafter: Drafter, limits: &Limits) -> Self {
        match drafter {
            Drafter::PromptLookup => Self::PromptLookup,
            Drafter::Model(executor) => Self::Model(DraftModel::new(executor, limits)),
        }
    }

    /// For every sequence of a step, in its order, before it is run; `moves` are the step's.
    pub(crate) fn draft(
        &mut self,
        moves: &[Move],
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Draft>, ExecutorError> {
        match self {
            Self::PromptLookup => Ok(wanted
                .iter()
                .map(|wanted| Draft { tokens: lookup::follows(wanted.tokens, wanted.room), computed: 0 })
                .collect()),
            Self::Model(model) => model.draft(moves, wanted),
        }
    }
}
