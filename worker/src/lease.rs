//! Transfers this gang receives, by id: who owns each, and where its KV lands.
//!
//! A transfer is owned by the `Decode` call it is for. Calls about it ([`Ask`]) are put to the owner, which alone holds the
//! reservation and the clock of the lease; when the owner goes, whatever the reason, its [`Transfer`] closes the landing,
//! gives the blocks back and forgets the id.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tonic::Status;

use crate::ranks::Followers;
use crate::transfer::Landing;

/// Asks a transfer's owner has not seen yet. There is one prefill leader a transfer and it waits for each answer.
const MAX_ASKS: usize = 4;

/// For the owner to answer a [`Ask::Renew`]. It waits for nothing else meanwhile.
const RENEW_DEADLINE: Duration = Duration::from_secs(5);

/// What a prefill leader wants of a transfer's owner.
#[derive(Debug)]
pub(crate) enum Ask {
    /// KV blocks and a lease on them.
    Reserve {
        /// Of the prompt, as the prefill gang counts them.
        prompt_tokens: usize,
        /// Answered when there are blocks.
        reply: oneshot::Sender<Result<Duration, Status>>,
    },
    /// More time.
    Renew {
        /// The lease from now on.
        reply: oneshot::Sender<Result<Duration, Status>>,
    },
}

#[derive(Debug)]
struct Entry {
    landing: Arc<Landing>,
    /// None: the owner is in the leader of this gang, another process.
    asks: Option<mpsc::Sender<Ask>>,
}

/// All open transfers of a gang.
#[derive(Debug, Default)]
pub(crate) struct Transfers {
    last: AtomicU64,
    open: Mutex<HashMap<u64, Entry>>,
    /// The other processes of the gang, which take a part of the KV each.
    followers: Option<Arc<Followers>>,
}

impl Transfers {
    pub(crate) fn new(followers: Option<Arc<Followers>>) -> Self {
        Self { followers, ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new transfer, with an id this epoch has not seen.
    pub(crate) fn register(self: &Arc<Self>) -> Transfer {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, asks) = mpsc::channel(MAX_ASKS);
        let landing = Arc::<Landing>::default();
        self.lock().insert(id, Entry { landing: Arc::clone(&landing), asks: Some(sender) });
        Transfer { id, landing, asks, transfers: Arc::clone(self) }
    }

    /// A transfer whose owner is in another process of this gang.
    pub(crate) fn adopt(&self, id: u64) -> Arc<Landing> {
        let landing = Arc::<Landing>::default();
        self.lock().insert(id, Entry { landing: Arc::clone(&landing), asks: None });
        landing
    }

    /// Ends one that was adopted.
    pub(crate) fn forget(&self, id: u64) {
        if let Some(entry) = self.lock().remove(&id) {
            drop(entry.landing.close());
        }
    }

    /// Ends all that were adopted.
    pub(crate) fn forget_all(&self) {
        for (_, entry) in self.lock().drain() {
            drop(entry.landing.close());
        }
    }

    /// Where the KV of a transfer goes.
    pub(crate) fn landing(&self, id: u64) -> Option<Arc<Landing>> {
        self.lock().get(&id).map(|entry| Arc::clone(&entry.landing))
    }

    /// Transfers that are not over.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Answers `Reserve`: waits until the owner has blocks. The caller's deadline is the only one.
    pub(crate) async fn reserve(&self, id: u64, prompt_tokens: usize) -> Result<Duration, Status> {
        self.ask(id, |reply| Ask::Reserve { prompt_tokens, reply }).await
    }

    /// Answers `Renew`.
    pub(crate) async fn renew(&self, id: u64) -> Result<Duration, Status> {
        timeout(RENEW_DEADLINE, self.ask(id, |reply| Ask::Renew { reply }))
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("transfer {id}: no answer"))))
    }

    async fn ask(
        &self,
        id: u64,
        ask: impl FnOnce(oneshot::Sender<Result<Duration, Status>>) -> Ask,
    ) -> Result<Duration, Status> {
        let gone = || Status::not_found(format!("transfer {id} is not open"));
        let asks = self.lock().get(&id).and_then(|entry| entry.asks.clone()).ok_or_else(gone)?;
        let (reply, answer) = oneshot::channel();
        asks.send(ask(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A transfer, in the hands of its owner.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) id: u64,
    pub(crate) landing: Arc<Landing>,
    pub(crate) asks: mpsc::Receiver<Ask>,
    transfers: Arc<Transfers>,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(followers) = &self.transfers.followers {
            followers.close(self.id, false);
        }
        // After the other processes are told: the blocks are others' from here on.
        drop(self.landing.close());
        self.transfers.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn asks_reach_the_owner_until_it_goes() {
        let transfers = Arc::new(Transfers::default());
        let mut transfer = transfers.register();
        let id = transfer.id;
        let owner = async {
            let Some(Ask::Renew { reply }) = transfer.asks.recv().await else { panic!("not a renewal") };
            reply.send(Ok(Duration::from_secs(7))).unwrap();
            transfer
        };
        let (answer, transfer) = tokio::join!(transfers.renew(id), owner);
        assert_eq!(answer.unwrap(), Duration::from_secs(7));
        assert_eq!(transfers.count(), 1);

        let landing = transfers.landing(id).unwrap();
        drop(transfer);
        landing.closed().await;
        assert_eq!(transfers.count(), 0);
        assert!(transfers.landing(id).is_none());
        assert_eq!(transfers.renew(id).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(transfers.reserve(id, 1).await.unwrap_err().code(), Code::NotFound);
        assert_ne!(transfers.register().id, id, "never the same id again");
    }

    #[tokio::test]
    async fn an_owner_that_goes_answers_what_it_was_asked() {
        let transfers = Arc::new(Transfers::default());
        let transfer = transfers.register();
        let id = transfer.id;
        let owner = async {
            let mut transfer = transfer;
            let ask = transfer.asks.recv().await;
            drop(transfer);
            drop(ask);
        };
        let (answer, ()) = tokio::join!(transfers.reserve(id, 1), owner);
        assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    }
}
