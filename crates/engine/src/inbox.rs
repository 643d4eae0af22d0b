//! What the handles and the step loop share: commands on their way in, load and the end on their way out.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use herd_scheduler::{Continuation, Counters, Load, Scheduling, SequenceId, Work};
use tokio::sync::{mpsc, watch};

use crate::{Event, Sampling, SubmitError};

/// Where a sequence reports to, and how its tokens are drawn.
#[derive(Debug)]
pub(crate) struct Reporter {
    pub(crate) events: mpsc::Sender<Event>,
    /// Absent for a reservation.
    pub(crate) sampling: Option<Sampling>,
}

#[derive(Debug)]
pub(crate) enum Command {
    /// With the time it came.
    Submit(SequenceId, Work, Scheduling, Reporter, Instant),
    Decode(SequenceId, Continuation, Reporter),
    Release(SequenceId),
}

#[derive(Debug, Default)]
struct Inbox {
    /// In order. Bounded: submissions by the limit of the queue, everything else by the number of live handles, which give
    /// one command each.
    commands: Vec<Command>,
    /// Of the scheduler, and of what the loop has taken from here and not told of yet.
    load: Load,
    next_id: u64,
    closed: bool,
    stopped: Option<String>,
}

impl Inbox {
    /// Submissions that the loop has not seen are waiting too.
    fn load(&self) -> Load {
        let mut load = self.load;
        for command in &self.commands {
            if let Command::Submit(_, work, ..) = command {
                load.waiting += 1;
                load.waiting_prompt_tokens += work.prompt_tokens();
            }
        }
        load
    }
}

/// Load and counters for those who only look. Written under the inbox's lock, read without.
#[derive(Debug, Default)]
struct Seen {
    running: AtomicUsize,
    waiting: AtomicUsize,
    waiting_prompt_tokens: AtomicUsize,
    kv_blocks_used: AtomicUsize,
    steps: AtomicU64,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    prefill_recomputed_tokens: AtomicU64,
    prefix_cached_tokens: AtomicU64,
    preemptions: AtomicU64,
    preempted_recomputed_tokens: AtomicU64,
    swapped_blocks: AtomicU64,
    draft_tokens: AtomicU64,
    accepted_draft_tokens: AtomicU64,
}

impl Seen {
    fn set_load(&self, load: Load) {
        let Load { running, waiting, waiting_prompt_tokens, kv_blocks_used } = load;
        self.running.store(running, Relaxed);
        self.waiting.store(waiting, Relaxed);
        self.waiting_prompt_tokens.store(waiting_prompt_tokens, Relaxed);
        self.kv_blocks_used.store(kv_blocks_used, Relaxed);
    }

    fn set_counters(&self, counters: Counters) {
        let Counters {
            steps,
            prompt_tokens,
            output_tokens,
            prefill_recomputed_tokens,
            prefix_cached_tokens,
            preemptions,
            preempted_recomputed_tokens,
            swapped_blocks,
            draft_tokens,
            accepted_draft_tokens,
        } = counters;
        self.steps.store(steps, Relaxed);
        self.prompt_tokens.store(prompt_tokens, Relaxed);
        self.output_tokens.store(output_tokens, Relaxed);
        self.prefill_recomputed_tokens.store(prefill_recomputed_tokens, Relaxed);
        self.prefix_cached_tokens.store(prefix_cached_tokens, Relaxed);
        self.preemptions.store(preemptions, Relaxed);
        self.preempted_recomputed_tokens.store(preempted_recomputed_tokens, Relaxed);
        self.swapped_blocks.store(swapped_blocks, Relaxed);
        self.draft_tokens.store(draft_tokens, Relaxed);
        self.accepted_draft_tokens.store(accepted_draft_tokens, Relaxed);
    }
}

/// Shared by the engine's handles, the handles of its sequences, and the step loop.
#[derive(Debug)]
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    max_waiting: usize,
    load: watch::Sender<Load>,
    seen: Seen,
    stopped: watch::Sender<Option<String>>,
    #[cfg(test)]
    publications: AtomicUsize,
}

impl Shared {
    pub(crate) fn new(max_waiting: usize) -> Self {
        Self {
            inbox: Mutex::default(),
            wake: Condvar::new(),
            max_waiting,
            load: watch::Sender::default(),
            seen: Seen::default(),
            stopped: watch::Sender::default(),
            #[cfg(test)]
            publications: AtomicUsize::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request, or says at once that there is no room for it.
    pub(crate) fn submit(
        self: &Arc<Self>,
        work: Work,
        scheduling: Scheduling,
        reporter: Reporter,
    ) -> Result<Ticket, SubmitError> {
        let mut inbox = self.lock();
        if let Some(reason) = &inbox.stopped {
            return Err(SubmitError::Stopped(reason.clone()));
        }
        let waiting = inbox.load().waiting;
        if waiting >= self.max_waiting {
            return Err(SubmitError::Full { waiting });
        }
        let id = SequenceId(inbox.next_id);
        inbox.next_id += 1;
        inbox.commands.push(Command::Submit(id, work, scheduling, reporter, Instant::now()));
        let load = inbox.load();
        self.load.send_replace(load);
        self.seen.set_load(load);
        drop(inbox);
        self.wake.notify_one();
        Ok(Ticket { shared: Arc::clone(self), id })
    }

    fn decode(&self, id: SequenceId, from: Continuation, reporter: Reporter) -> Result<(), SubmitError> {
        let mut inbox = self.lock();
        if let Some(reason) = &inbox.stopped {
            return Err(SubmitError::Stopped(reason.clone()));
        }
        inbox.commands.push(Command::Decode(id, from, reporter));
        drop(inbox);
        self.wake.notify_one();
        Ok(())
    }

    /// Commands since the last call. Waits for one when there is nothing else to do. `None`: the last handle is gone.
    pub(crate) fn take(&self, idle: bool) -> Option<Vec<Command>> {
        let mut inbox = self.lock();
        while idle && inbox.commands.is_empty() && !inbox.closed {
            // No deadline: whatever there is to be done next comes through this door and rings the bell.
            inbox = self.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        if inbox.closed {
            return None;
        }
        inbox.load = inbox.load();
        Some(std::mem::take(&mut inbox.commands))
    }

    /// The loop has taken in what it took from the inbox, or ended a step. Called after each before any event is sent, so
    /// that who gets an event sees load and counters that include it.
    pub(crate) fn publish(&self, load: Load, counters: Counters) {
        #[cfg(test)]
        self.publications.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut inbox = self.lock();
        inbox.load = load;
        let load = inbox.load();
        self.seen.set_load(load);
        self.seen.set_counters(counters);
        self.load.send_if_modified(|current| std::mem::replace(current, load) != load);
    }

    /// Nothing is taken from now on. Returns what is in the inbox still.
    pub(crate) fn stop(&self, reason: &str) -> Vec<Command> {
        let mut inbox = self.lock();
        inbox.stopped.get_or_insert_with(|| reason.to_owned());
        let left = std::mem::take(&mut inbox.commands);
        inbox.load = Load::default();
        self.load.send_replace(Load::default());
        self.seen.set_load(Load::default());
        drop(inbox);
        self.stopped.send_replace(Some(reason.to_owned()));
        left
    }

    /// Asks the loop to end.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    pub(crate) fn watch_load(&self) -> watch::Receiver<Load> {
        self.load.subscribe()
    }

    pub(crate) fn watch_stopped(&self) -> watch::Receiver<Option<String>> {
        self.stopped.subscribe()
    }

    pub(crate) fn busy(&self) -> Load {
        let Seen { running, waiting, waiting_prompt_tokens, kv_blocks_used, .. } = &self.seen;
        Load {
            running: running.load(Relaxed),
            waiting: waiting.load(Relaxed),
            waiting_prompt_tokens: waiting_prompt_tokens.load(Relaxed),
            kv_blocks_used: kv_blocks_used.load(Relaxed),
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        let Seen {
            steps,
            prompt_tokens,
            output_tokens,
            prefill_recomputed_tokens,
            prefix_cached_tokens,
            preemptions,
            preempted_recomputed_tokens,
            swapped_blocks,
            draft_tokens,
            accepted_draft_tokens,
            ..
        } = &self.seen;
        Counters {
            steps: steps.load(Relaxed),
            prompt_tokens: prompt_tokens.load(Relaxed),
            output_tokens: output_tokens.load(Relaxed),
            prefill_recomputed_tokens: prefill_recomputed_tokens.load(Relaxed),
            prefix_cached_tokens: prefix_cached_tokens.load(Relaxed),
            preemptions: preemptions.load(Relaxed),
            preempted_recomputed_tokens: preempted_recomputed_tokens.load(Relaxed),
            swapped_blocks: swapped_blocks.load(Relaxed),
            draft_tokens: draft_tokens.load(Relaxed),
            accepted_draft_tokens: accepted_draft_tokens.load(Relaxed),
        }
    }

    /// Turns of the loop and steps it ran.
    #[cfg(test)]
    pub(crate) fn publications(&self) -> usize {
        self.publications.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// A sequence's claim on the queue, on a slot, on blocks. Dropping it gives all of it back within one step.
#[derive(Debug)]
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    id: SequenceId,
}

impl Ticket {
    pub(crate) fn decode(&self, from: Continuation, reporter: Reporter) -> Result<(), SubmitError> {
        self.shared.decode(self.id, from, reporter)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inbox = self.shared.lock();
        if inbox.stopped.is_none() {
            inbox.commands.push(Command::Release(self.id));
            drop(inbox);
            self.shared.wake.notify_one();
        }
    }
}
