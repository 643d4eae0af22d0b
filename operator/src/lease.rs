//! Leader election by a Lease of coordination.k8s.io, compatible with client-go's: of the operators that share a lease, one
//! leads. Who leads renews the lease; the others take it once they have seen no renewal for as long as it lasts.

mod candidate;
mod election;
mod error;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use self::candidate::{Attempt, Candidate};
use self::election::{Election, Timing};
use self::error::LeaseError;

/// Which lease, and whom to write into it.
#[derive(Clone, Debug)]
pub(crate) struct LeaseOptions {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// No two candidates may have the same one.
    pub(crate) identity: String,
}

/// The lease is ours; a task renews it. Dropping it stops the renewals without giving the lease back, so that nobody leads
/// until it has expired.
#[derive(Debug)]
pub(crate) struct Leadership {
    timing: Timing,
    stop: CancellationToken,
    lost: CancellationToken,
    /// One task, which ends with this.
    renewal: JoinSet<Option<Candidate>>,
}

impl Leadership {
    /// Waits until the lease is ours, for ever if need be. Errors are logged and tried again.
    pub(crate) async fn acquire(client: Client, options: LeaseOptions) -> Self {
        Self::acquire_within(client, options, Timing::default()).await
    }

    async fn acquire_within(client: Client, options: LeaseOptions, timing: Timing) -> Self {
        let LeaseOptions { namespace, name, identity } = options;
        tracing::info!(%namespace, lease = %name, %identity, "waiting for the lease");
        let api: Api<Lease> = Api::namespaced(client, &namespace);
        let mut candidate = Candidate::new(api, name, Election::new(identity.clone(), timing));
        let sent = win(&mut candidate, timing).await;
        tracing::info!(%identity, "leading");
        let (stop, lost) = (CancellationToken::new(), CancellationToken::new());
        let mut renewal = JoinSet::new();
        renewal.spawn(renew(candidate, timing, sent, stop.clone(), lost.clone()));
        Self { timing, stop, lost, renewal }
    }

    /// Resolves once the lease could not be renewed within the renew deadline, or is another's. What needs leadership must
    /// end then: after the rest of the lease's duration another may lead.
    pub(crate) async fn lost(&mut self) {
        self.lost.cancelled().await;
    }

    /// Gives the lease back, so that the next one need not wait until it expires. What needs leadership must have ended.
    /// An API server that does not answer delays this by at most the renew deadline.
    pub(crate) async fn release(self) {
        let Self { timing, stop, lost: _, mut renewal } = self;
        stop.cancel();
        let Some(Ok(Some(candidate))) = renewal.join_next().await else { return };
        match timeout(timing.renew_deadline, candidate.release()).await {
            Ok(Ok(true)) => tracing::info!("gave the lease back"),
            Ok(Ok(false)) => tracing::info!("the lease is another's already"),
            Ok(Err(error)) => tracing::warn!(error = dynamic(&error), "failed to give the lease back"),
            Err(_) => {
                tracing::warn!(within = ?timing.renew_deadline, "failed to give the lease back in time");
            }
        }
    }
}

/// Tries until the lease is the candidate's. Returns when the request that won it was sent.
async fn win(candidate: &mut Candidate, timing: Timing) -> Instant {
    let mut said = String::new();
    loop {
        let retry = Instant::now() + timing.retry_period;
        let (next, now_said) = match candidate.attempt().await {
            Ok(Attempt::Leads { sent }) => return sent,
            Ok(Attempt::Waits { holder, until }) => {
                let saying = format!("held by {holder}");
                if saying != said {
                    tracing::info!(%holder, "another leads");
                }
                (retry.min(until), saying)
            }
            Err(error) => {
                let saying = error.to_string();
                if saying != said {
                    tracing::warn!(error = dynamic(&error), "failed to get the lease, trying again");
                }
                (retry, saying)
            }
        };
        said = now_said;
        sleep_until(next).await;
    }
}

/// Renews until told to stop, which gives the candidate back, or until leadership is lost.
async fn renew(
    mut candidate: Candidate,
    timing: Timing,
    mut renewed: Instant,
    stop: CancellationToken,
    lost: CancellationToken,
) -> Option<Candidate> {
    // However this task ends, nobody goes on as a leader whose lease is not renewed.
    let _lost = lost.drop_guard();
    let mut next = renewed + timing.retry_period;
    loop {
        let deadline = timing.leads_until(renewed);
        let attempt = async {
            sleep_until(next).await;
            candidate.attempt().await
        };
        let attempt = tokio::select! {
            () = stop.cancelled() => return Some(candidate),
            attempt = timeout_at(deadline, attempt) => attempt,
        };
        match attempt {
            Ok(Ok(Attempt::Leads { sent })) => {
                renewed = sent;
                next = sent + timing.retry_period;
            }
            Ok(Ok(Attempt::Waits { holder, .. })) => {
                tracing::error!(%holder, "lost the lease: another holds it");
                return None;
            }
            Ok(Err(error)) => {
                tracing::warn!(error = dynamic(&error), "failed to renew the lease, trying again");
                next = Instant::now() + timing.retry_period;
            }
            Err(_) => {
                tracing::error!(deadline = ?timing.renew_deadline, "lost the lease: it could not be renewed");
                return None;
            }
        }
    }
}

/// For the log, which prints what is behind it too.
fn dynamic(error: &LeaseError) -> &(dyn std::error::Error + 'static) {
    error
}
