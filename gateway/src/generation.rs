//! A validated request in work: its choices run side by side in one task, their events come out of one bounded channel.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use tokio::sync::mpsc;

use crate::RequestError;
use crate::best_of::BestOf;
use crate::choice::Choice;
use crate::event::{EventKind, GenerationEvent};
use crate::gateway::Parts;
use crate::metrics::ModelMetrics;
use crate::observe::Admitted;
use crate::task::OwnedTask;
use crate::validate::ValidatedGeneration;

/// Events taken from the channel at once.
const BATCH: usize = 64;

/// The events of a generation. An error is the last item. Dropping it drops every Decode stream at once, in whatever phase.
pub(crate) struct Events {
    receiver: mpsc::Receiver<Result<GenerationEvent, RequestError>>,
    ready: VecDeque<Result<GenerationEvent, RequestError>>,
    admitted: Admitted,
    /// Until all choices have ended, where the best are chosen.
    best: Option<BestOf>,
    /// Of the best ones.
    chosen: VecDeque<GenerationEvent>,
    _task: OwnedTask,
}

/// Starts all choices.
pub(crate) fn start(
    parts: &Arc<Parts>,
    generation: ValidatedGeneration,
    model_metrics: Arc<ModelMetrics>,
    admitted: Admitted,
) -> Events {
    let (sender, receiver) = mpsc::channel(parts.limits.buffered_events);
    let parts = Arc::clone(parts);
    let (prompts, n, best_of) = (generation.prompts.len(), generation.n, generation.best_of);
    let best = (best_of > n).then(|| BestOf::new(prompts, n, best_of));
    let task = OwnedTask::spawn(async move {
        let prompt_tokens: usize = generation.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        model_metrics.prompt_tokens.inc_by(prompt_tokens as u64);
        let choices: Vec<Choice<'_>> = (0..generation.choices())
            .map(|index| Choice {
                generation: &generation,
                index,
                fleet: &parts.fleet,
                limits: &parts.limits,
                metrics: &parts.metrics,
                model_metrics: &model_metrics,
                events: sender.clone(),
            })
            .collect();
        let mut running: FuturesUnordered<_> = choices.iter().map(Choice::run).collect();
        loop {
            let result = tokio::select! {
                result = running.next() => result,
                () = parts.out_of_time.cancelled() => Some(Err(RequestError::shutting_down())),
            };
            let Some(result) = result else { return };
            if let Err(error) = result {
                drop(running);
                // A client that reads nothing is not waited for.
                let _ = tokio::time::timeout(parts.limits.slow_client, sender.send(Err(error))).await;
                return;
            }
        }
    });
    Events { receiver, ready: VecDeque::new(), admitted, best, chosen: VecDeque::new(), _task: task }
}

impl Stream for Events {
    type Item = Result<GenerationEvent, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(event) = this.chosen.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let next = std::task::ready!(this.poll_event(cx));
            match (this.best.take(), next) {
                (None, next) | (Some(_), next @ Some(Err(_))) => return Poll::Ready(next),
                (Some(mut best), Some(Ok(event))) => {
                    best.take(event);
                    this.best = Some(best);
                }
                (Some(best), None) => this.chosen = best.finish(),
            }
        }
    }
}

impl Events {
    /// The next one as it comes.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<GenerationEvent, RequestError>>> {
        let this = self;
        if this.ready.is_empty() {
            let mut batch = Vec::new();
            std::task::ready!(this.receiver.poll_recv_many(cx, &mut batch, BATCH));
            for next in batch {
                let left = match (this.ready.back_mut(), next) {
                    (Some(Ok(last)), Ok(next)) => last.absorb(next).map(Ok),
                    (_, next) => Some(next),
                };
                this.ready.extend(left);
            }
        }
        let next = this.ready.pop_front();
        match &next {
            Some(Ok(GenerationEvent { kind: EventKind::Delta(_), .. })) => this.admitted.token(),
            Some(Ok(_)) => {}
            Some(Err(error)) => this.admitted.ended(Some(error)),
            None => this.admitted.ended(None),
        }
        Poll::Ready(next)
    }
}
