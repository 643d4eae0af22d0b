//! How many requests are in work at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::RequestError;
use crate::error::RETRY_AFTER;

/// Counts requests in, refuses at once when full: a queue here would only hide that the gangs are behind.
#[derive(Clone)]
pub(crate) struct Admission {
    slots: Arc<Semaphore>,
    limit: usize,
}

/// A request's place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Admission {
    pub(crate) fn new(limit: usize) -> Self {
        Self { slots: Arc::new(Semaphore::new(limit)), limit }
    }

    pub(crate) fn admit(&self) -> Result<Permit, RequestError> {
        let permit = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| RequestError::Busy {
            message: format!("the gateway is full: {} requests are in work", self.limit),
            retry_after: RETRY_AFTER,
        })?;
        Ok(Permit(permit))
    }
}
