//! Admission: what is taken, what still runs, and how a gang is emptied.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use herd_proto::internal::v1::Phase;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::refusal;

/// For requests to end after they were told to: each ends where it waits.
const ABORT_DEADLINE: Duration = Duration::from_secs(5);

/// Counts the requests of a gang. Every `Decode` and `Prefill` holds a [`Ticket`] until its work is over.
#[derive(Debug)]
pub(crate) struct Admission {
    phase: watch::Sender<Phase>,
    running: watch::Sender<usize>,
    capacity: usize,
    abort: CancellationToken,
    /// Why what runs has to end.
    reason: OnceLock<&'static str>,
}

/// A request that was taken.
#[derive(Debug)]
pub(crate) struct Ticket {
    admission: Arc<Admission>,
}

impl Admission {
    /// Takes at most `capacity` requests at a time.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            phase: watch::Sender::new(Phase::Ready),
            running: watch::Sender::new(0),
            capacity,
            abort: CancellationToken::new(),
            reason: OnceLock::new(),
        }
    }

    /// Takes a request, or refuses it before anything was done for it.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Ticket, Status> {
        // Counted first: a drain that does not see this request here is seen by it below.
        self.running.send_modify(|running| *running += 1);
        let ticket = Ticket { admission: Arc::clone(self) };
        if self.phase() == Phase::Draining {
            return Err(refusal::draining());
        }
        if *self.running.borrow() > self.capacity {
            return Err(refusal::full(format!("{} requests are being served", self.capacity)));
        }
        Ok(ticket)
    }

    /// Now.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Tickets that are out.
    pub(crate) fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Whenever it changes.
    pub(crate) fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Takes nothing more, waits for what runs, aborts what is left at the deadline and returns how many that were.
    pub(crate) async fn drain(&self, deadline: Duration) -> usize {
        self.phase.send_replace(Phase::Draining);
        let mut running = self.running.subscribe();
        if timeout(deadline, running.wait_for(|running| *running == 0)).await.is_ok() {
            return 0;
        }
        let aborted = *running.borrow_and_update();
        self.abort("this gang was drained and its deadline is up");
        if timeout(ABORT_DEADLINE, running.wait_for(|running| *running == 0)).await.is_err() {
            tracing::error!("requests did not end within {ABORT_DEADLINE:?} of being aborted");
        }
        aborted
    }

    /// Ends everything that runs; the first reason counts.
    pub(crate) fn abort(&self, reason: &'static str) {
        self.reason.get_or_init(|| reason);
        self.abort.cancel();
    }

    /// Resolves when what runs has to end.
    pub(crate) async fn aborted(&self) -> Status {
        self.abort.cancelled().await;
        Status::unavailable(format!("aborted: {}", self.reason.get().copied().unwrap_or_default()))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.running.send_modify(|running| *running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_the_last_ticket() {
        let admission = Arc::new(Admission::new(2));
        let ticket = admission.enter().unwrap();
        let drain = admission.drain(Duration::from_mins(10));
        tokio::pin!(drain);
        assert!(futures::poll!(&mut drain).is_pending());
        let status = admission.enter().unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "draining, not started"));
        assert!(futures::poll!(&mut drain).is_pending());
        drop(ticket);
        assert_eq!(drain.await, 0);
    }

    #[tokio::test]
    async fn what_outlives_the_deadline_is_told_to_end() {
        let admission = Arc::new(Admission::new(2));
        let ticket = admission.enter().unwrap();
        let request = async {
            admission.aborted().await;
            drop(ticket);
        };
        let (aborted, ()) = tokio::join!(admission.drain(Duration::ZERO), request);
        assert_eq!(aborted, 1);
    }

    #[test]
    fn capacity_is_a_bound() {
        let admission = Arc::new(Admission::new(1));
        let ticket = admission.enter().unwrap();
        assert_eq!(admission.enter().unwrap_err().code(), Code::ResourceExhausted);
        drop(ticket);
        assert!(admission.enter().is_ok());
    }
}
