//! Who owns which KV block, and what blocks that nobody owns still hold.

use std::collections::{BTreeMap, HashMap};

use crate::BlockId;
use crate::names::BlockName;

/// All KV blocks of a rank. Each is owned (by one sequence or, if it has a name, by several), cached (a name, no owner) or free.
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    /// No owner and no name.
    free: Vec<BlockId>,
    /// No owner but a name, by the time of its last release: the first one is evicted first.
    cached: BTreeMap<u64, BlockId>,
    /// One block a name.
    named: HashMap<BlockName, BlockId>,
    /// Rises with every release.
    time: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    owners: usize,
    name: Option<BlockName>,
    /// Its key in `cached`.
    released: u64,
}

impl BlockPool {
    /// All blocks free; the lowest are handed out first.
    pub(crate) fn new(total: usize) -> Self {
        Self {
            blocks: vec![Block::default(); total],
            free: (0..total as BlockId).rev().collect(),
            cached: BTreeMap::new(),
            named: HashMap::new(),
            time: 0,
        }
    }

    /// Blocks that can be taken: free ones and cached ones.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Blocks that are owned.
    pub(crate) fn used(&self) -> usize {
        self.blocks.len() - self.available()
    }

    /// Takes `count` blocks for one owner, or none at all. Cached ones lose their names once no free one is left, those that
    /// were released first before others.
    pub(crate) fn take(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.available() {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let block = self.free.pop().or_else(|| self.evict())?;
            if let Some(state) = self.blocks.get_mut(block as usize) {
                state.owners = 1;
            }
            taken.push(block);
        }
        Some(taken)
    }

    fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.cached.pop_first()?;
        if let Some(name) = self.blocks.get_mut(block as usize).and_then(|state| state.name.take()) {
            self.named.remove(&name);
        }
        Some(block)
    }

    /// The block of this name, owned or cached.
    pub(crate) fn find(&self, name: BlockName) -> Option<BlockId> {
        self.named.get(&name).copied()
    }

    /// One more owner of a block that was found.
    pub(crate) fn share(&mut self, block: BlockId) {
        if let Some(state) = self.blocks.get_mut(block as usize) {
            if state.owners == 0 {
                self.cached.remove(&state.released);
            }
            state.owners += 1;
        }
    }

    /// The KV of an owned block is complete and follows from this name. Where another block has the name, that one keeps it.
    pub(crate) fn name(&mut self, block: BlockId, name: BlockName) {
        if self.named.contains_key(&name) {
            return;
        }
        if let Some(state) = self.blocks.get_mut(block as usize)
            && state.name.is_none()
        {
            state.name = Some(name);
            self.named.insert(name, block);
        }
    }

    /// One owner less of each. The last ones of a table are evicted before the first ones, without which they are of no use.
    pub(crate) fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let Some(state) = self.blocks.get_mut(block as usize) else { continue };
            state.owners = state.owners.saturating_sub(1);
            if state.owners > 0 {
                continue;
            }
            if state.name.is_some() {
                self.time += 1;
                state.released = self.time;
                self.cached.insert(self.time, block);
            } else {
                self.free.push(block);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> Vec<BlockId> {
        self.free.clone()
    }

    #[cfg(test)]
    pub(crate) fn cached(&self) -> Vec<BlockId> {
        self.cached.values().copied().collect()
    }

    #[cfg(test)]
    pub(crate) fn owners(&self, block: BlockId) -> usize {
        self.blocks[block as usize].owners
    }
}

/// The slots of the host pool that nobody has.
#[derive(Debug)]
pub(crate) struct HostPool {
    free: Vec<BlockId>,
}

impl HostPool {
    /// Slots are numbered from `first` on.
    pub(crate) fn new(first: usize, slots: usize) -> Self {
        Self { free: (first as BlockId..(first + slots) as BlockId).rev().collect() }
    }

    /// Takes `count` slots, or none at all.
    pub(crate) fn take(&mut self, count: usize) -> Option<Vec<BlockId>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest))
    }

    pub(crate) fn release(&mut self, slots: &[BlockId]) {
        self.free.extend(slots);
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> &[BlockId] {
        &self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Chain;

    fn names(count: usize) -> Vec<BlockName> {
        let mut chain = Chain::new("");
        chain.extend(&(0..count as u32).collect::<Vec<_>>(), 1);
        (0..count).map(|block| chain.get(block).unwrap()).collect()
    }

    #[test]
    fn takes_all_or_nothing() {
        let mut pool = BlockPool::new(3);
        let two = pool.take(2).unwrap();
        assert_eq!(two, [0, 1]);
        assert!(pool.take(2).is_none());
        assert_eq!(pool.used(), 2);
        pool.release(&two);
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.take(3).unwrap(), [0, 1, 2]);
    }

    #[test]
    fn named_blocks_are_kept_until_they_are_needed_the_longest_unused_goes_first() {
        let (mut pool, names) = (BlockPool::new(4), names(3));
        let (one, other) = (pool.take(2).unwrap(), pool.take(1).unwrap());
        pool.name(one[0], names[0]);
        pool.name(one[1], names[1]);
        pool.name(other[0], names[2]);
        pool.release(&one);
        pool.release(&other);
        assert_eq!((pool.used(), pool.available()), (0, 4));
        assert_eq!(pool.take(2).unwrap(), [3, 1], "the free one, then the end of the table released first");
        assert_eq!(pool.find(names[1]), None);
        assert_eq!(pool.find(names[0]), Some(0));
        pool.share(0);
        assert_eq!(pool.take(1).unwrap(), [2], "the one that is owned again is not evicted");
        assert!(pool.take(1).is_none());
    }

    #[test]
    fn a_shared_block_is_owned_until_its_last_owner_goes() {
        let (mut pool, names) = (BlockPool::new(1), names(1));
        let table = pool.take(1).unwrap();
        pool.name(0, names[0]);
        pool.share(0);
        pool.release(&table);
        assert_eq!((pool.used(), pool.take(1)), (1, None));
        pool.release(&table);
        assert_eq!((pool.used(), pool.find(names[0])), (0, Some(0)));
    }

    #[test]
    fn a_name_stays_with_the_block_that_had_it_first() {
        let (mut pool, names) = (BlockPool::new(2), names(1));
        let table = pool.take(2).unwrap();
        pool.name(0, names[0]);
        pool.name(1, names[0]);
        pool.release(&table);
        assert_eq!((pool.free(), pool.cached()), (vec![1], vec![0]));
    }
}
