//! Holding a step of the fake backend until a test has done what it wants to do during it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use herd_scheduler::StepPlan;
use tokio::sync::watch;

use crate::ExecutorError;

/// A test that has failed lets go of the step it holds at last, so that the engine's thread can be joined.
const LONGEST_HOLD: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// The held step may go on.
    permit: bool,
    failure: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    turn: Condvar,
    held: watch::Sender<Option<StepPlan>>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by the executor before it computes a step.
    pub(super) fn pass(&self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let mut state = self.lock();
        if state.closed {
            self.held.send_replace(Some(plan.clone()));
            let waiting = |state: &mut State| state.closed && !state.permit;
            let waited = self.turn.wait_timeout_while(state, LONGEST_HOLD, waiting);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.permit = false;
            self.held.send_replace(None);
            if timeout.timed_out() {
                return Err(ExecutorError::BadPlan(format!("held for {LONGEST_HOLD:?}")));
            }
        }
        match state.failure.take() {
            Some(message) => Err(ExecutorError::RankStopped { rank: 0, message }),
            None => Ok(()),
        }
    }
}

/// Holds the steps of a [`super::FakeModel`] and makes them fail. Open to begin with.
#[derive(Clone, Debug)]
pub struct FakeControl {
    gate: Arc<Gate>,
}

impl FakeControl {
    pub(super) fn new(gate: &Arc<Gate>) -> Self {
        Self { gate: Arc::clone(gate) }
    }

    /// From now on every step waits before it computes anything: 30 s at most, then it fails. An engine cannot be dropped
    /// while a step is held (its thread is joined): [`FakeControl::open`] first.
    pub fn close(&self) {
        self.gate.lock().closed = true;
    }

    /// Lets the held step and all later ones go.
    pub fn open(&self) {
        self.gate.lock().closed = false;
        self.gate.turn.notify_all();
    }

    /// Resolves when a step is held; with its plan. No step is held, ever, unless there is something to compute.
    pub async fn held(&self) -> StepPlan {
        let mut held = self.gate.held.subscribe();
        match held.wait_for(Option::is_some).await {
            Ok(plan) => plan.clone().unwrap_or_default(),
            Err(_) => StepPlan::default(),
        }
    }

    /// Waits until a step is held and lets that one go, and no other; returns its plan.
    pub async fn pass(&self) -> StepPlan {
        let plan = self.held().await;
        let mut state = self.gate.lock();
        state.permit = true;
        // Here, not in the thread that wakes up: a second call must not see the same step.
        self.gate.held.send_replace(None);
        drop(state);
        self.gate.turn.notify_all();
        plan
    }

    /// Makes the next step that goes through the gate (the held one, if there is one) fail.
    pub fn fail(&self, message: &str) {
        self.gate.lock().failure = Some(message.to_owned());
    }
}
