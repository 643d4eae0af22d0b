//! Where the KV of one transfer lands: blocks that are written to only as long as they are reserved.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use herd_engine::{KvSlab, KvStore, Reservation};
use tokio_util::sync::CancellationToken;

use super::coverage::Coverage;
use super::{FrameHeader, Reject};

/// A transfer's blocks on all ranks. Frames are written under the read lock, the reservation leaves under the write lock:
/// no block is given back while a frame is being copied into it.
#[derive(Debug, Default)]
pub(crate) struct Landing {
    open: RwLock<Option<Open>>,
    closed: CancellationToken,
}

#[derive(Debug)]
struct Open {
    /// None: the leader of this gang, another process, holds it.
    reservation: Option<Reservation>,
    blocks: Arc<[u32]>,
    /// By rank.
    coverage: Vec<Mutex<Coverage>>,
}

impl Landing {
    /// Opens it for the KV of a prompt.
    pub(crate) fn open(
        &self,
        reservation: Option<Reservation>,
        blocks: Arc<[u32]>,
        stores: &[Arc<dyn KvStore>],
        prompt_tokens: usize,
        block_tokens: usize,
    ) {
        let coverage = stores
            .iter()
            .map(|store| Coverage::new(store.layers(), store.heads(), prompt_tokens, block_tokens))
            .map(Mutex::new)
            .collect();
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if !self.closed.is_cancelled() {
            *open = Some(Open { reservation, blocks, coverage });
        }
    }

    /// Whether frames are welcome.
    pub(crate) fn is_open(&self) -> bool {
        self.open.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether every rank of this process has all of the prompt.
    pub(crate) fn is_complete(&self) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.as_ref().is_some_and(|open| open.coverage.iter().all(|rank| lock(rank).is_complete()))
    }

    /// Copies a verified frame into the blocks of the rank with this number in this process. Some tens of kilobytes: shorter than handing it to another thread.
    pub(crate) fn write(
        &self,
        rank: usize,
        store: &dyn KvStore,
        header: &FrameHeader,
        payload: Vec<u8>,
    ) -> Result<(), Reject> {
        let FrameHeader { transfer: _, epoch: _, dtype: _, layers, heads, block, rows } = header;
        let (layers, heads) = (widen(layers), widen(heads));
        let (block, rows) = (*block as usize, usize::from(*rows));
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Open { reservation: _, blocks, coverage }) = open.as_ref() else {
            return Err(Reject::Transfer);
        };
        let (Some(coverage), Some(&target)) = (coverage.get(rank), blocks.get(block)) else {
            return Err(Reject::Bounds);
        };
        lock(coverage).check(block, &layers, &heads, rows).map_err(|_| Reject::Bounds)?;
        let mut rest = payload;
        let layer_bytes = rest.len() / layers.len();
        for layer in layers.clone() {
            let next = rest.split_off(layer_bytes);
            let slab = KvSlab { layer, heads: heads.clone(), bytes: rest };
            store.write(target, &slab).map_err(|_| Reject::Bounds)?;
            rest = next;
        }
        lock(coverage).record(block, &layers, &heads, rows);
        Ok(())
    }

    /// Ends it for good: connections close, later frames are refused. Whoever takes the reservation may give it back.
    pub(crate) fn close(&self) -> Option<Reservation> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        self.closed.cancel();
        open.take().and_then(|open| open.reservation)
    }

    /// Resolves when it is closed.
    pub(crate) async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

fn lock(coverage: &Mutex<Coverage>) -> MutexGuard<'_, Coverage> {
    coverage.lock().unwrap_or_else(PoisonError::into_inner)
}

fn widen(range: &Range<u16>) -> Range<usize> {
    usize::from(range.start)..usize::from(range.end)
}
