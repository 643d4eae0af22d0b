//! How many requests are in work at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::RequestError;
use crate::error::RETRY_AFTER;

/// Counts requests in, refuses at once when full: a queue here would only hide that the gangs are behind.
#[derive(Clone)]
pub(crate) struct Admission {
    slots: Arc<Semaphore>,
    limit: usize,
    closed: Arc<AtomicBool>,
}

/// A request's place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Admission {
    pub(crate) fn new(limit: usize) -> Self {
        // A wait for all of them counts in 32 bits.
        let limit = limit.min(u32::MAX as usize).min(Semaphore::MAX_PERMITS);
        Self { slots: Arc::new(Semaphore::new(limit)), limit, closed: Arc::default() }
    }

    pub(crate) fn admit(&self) -> Result<Permit, RequestError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(RequestError::shutting_down());
        }
        let permit = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| RequestError::Busy {
            message: format!("the gateway is full: {} requests are in work", self.limit),
            retry_after: RETRY_AFTER,
        })?;
        Ok(Permit(permit))
    }

    /// Refuses from now on, and waits until every request that is in has ended.
    pub(crate) async fn drain(&self) {
        self.closed.store(true, Ordering::Relaxed);
        let _ = self.slots.acquire_many(self.limit as u32).await;
    }
}
