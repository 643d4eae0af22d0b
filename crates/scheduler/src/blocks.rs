//! Who owns which KV block.

use std::sync::Arc;

use crate::BlockId;

/// The KV blocks nobody owns. A block is in here or in the block table of exactly one sequence.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Vec<BlockId>,
    total: usize,
}

impl BlockPool {
    /// All blocks free; the lowest are handed out first.
    pub(crate) fn new(total: usize) -> Self {
        Self { free: (0..total as BlockId).rev().collect(), total }
    }

    /// Takes `count` blocks, or none at all.
    pub(crate) fn take(&mut self, count: usize) -> Option<Arc<[BlockId]>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest).into_iter().rev().collect())
    }

    /// Takes back what [`BlockPool::take`] gave.
    pub(crate) fn give_back(&mut self, blocks: &[BlockId]) {
        self.free.extend(blocks.iter().rev());
    }

    /// Blocks that are owned.
    pub(crate) fn used(&self) -> usize {
        self.total - self.free.len()
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> &[BlockId] {
        &self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_all_or_nothing() {
        let mut pool = BlockPool::new(3);
        let two = pool.take(2).unwrap();
        assert_eq!(&*two, [0, 1]);
        assert!(pool.take(2).is_none());
        assert_eq!(pool.used(), 2);
        pool.give_back(&two);
        assert_eq!(pool.used(), 0);
        assert_eq!(&*pool.take(3).unwrap(), [0, 1, 2]);
    }
}
