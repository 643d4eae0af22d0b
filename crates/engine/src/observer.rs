//! What the step loop tells of its work, for metrics.

use std::time::Duration;

/// Told of what an engine does, on the thread of its step loop: it must not wait for anything, nor take memory for each token.
pub trait Observer: Send + Sync {
    /// A request left the queue after this time.
    fn started(&self, queued: Duration);

    /// A step was run, from its plan to the sampled tokens.
    fn stepped(&self, step: StepDone);

    /// A token was sampled so long after the one before it of the same sequence.
    fn token(&self, since_the_last: Duration);
}

/// A step that was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepDone {
    /// It took.
    pub time: Duration,
    /// Computed in it.
    pub tokens: usize,
    /// In its batch.
    pub sequences: usize,
}

/// Nobody looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unobserved;

impl Observer for Unobserved {
    fn started(&self, _: Duration) {}

    fn stepped(&self, _: StepDone) {}

    fn token(&self, _: Duration) {}
}
