//! Names of full blocks: what their KV follows from, hashed.
//!
//! KV of a position depends on the token there and on all tokens before it. So a block is named by SHA-256 over the name of
//! the block before it and its own tokens, and the first one over the hash of the cache salt: blocks of equal names hold equal
//! KV, and those of two salts never have one name. With 256 bits nobody finds two contents of one name, not even who tries to.

use sha2::{Digest as _, Sha256};

/// Begins every chain.
const DOMAIN: &[u8] = b"herd kv block chain 1\0";

/// Of a full block, or of the beginning of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockName([u8; 32]);

/// Names of the full blocks of one sequence, as far as its tokens are known.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// Of the salt: what the first block follows.
    root: BlockName,
    names: Vec<BlockName>,
}

impl Chain {
    pub(crate) fn new(salt: &str) -> Self {
        let root = Sha256::new().chain_update(DOMAIN).chain_update(salt);
        Self { root: BlockName(root.finalize().into()), names: Vec::new() }
    }

    /// Names the full blocks of `tokens` that have none yet.
    pub(crate) fn extend(&mut self, tokens: &[u32], block_tokens: usize) {
        for block in tokens.chunks_exact(block_tokens).skip(self.names.len()) {
            let mut hash = Sha256::new().chain_update(self.before(self.names.len()).0);
            for token in block {
                hash.update(token.to_le_bytes());
            }
            self.names.push(BlockName(hash.finalize().into()));
        }
    }

    /// Of the block with this number.
    pub(crate) fn get(&self, block: usize) -> Option<BlockName> {
        self.names.get(block).copied()
    }

    /// Of what the block with this number follows.
    fn before(&self, block: usize) -> BlockName {
        block.checked_sub(1).and_then(|before| self.get(before)).unwrap_or(self.root)
    }

    /// Whether all before the block with this number is the same in both.
    pub(crate) fn agrees_up_to(&self, other: &Self, block: usize) -> bool {
        block <= self.names.len() && block <= other.names.len() && self.before(block) == other.before(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(salt: &str, tokens: &[u32]) -> Chain {
        let mut chain = Chain::new(salt);
        chain.extend(tokens, 2);
        chain
    }

    #[test]
    fn names_follow_from_all_tokens_before_and_from_the_salt() {
        let one = chain("", &[1, 2, 3, 4, 5]);
        assert_eq!(one.names.len(), 2, "the last block is not full");
        assert_eq!(chain("", &[1, 2, 3, 4]).names, one.names);
        let other = chain("", &[1, 7, 3, 4]);
        assert_ne!(other.get(0), one.get(0));
        assert_ne!(other.get(1), one.get(1), "the block before counts");
        assert_ne!(chain("salt", &[1, 2, 3, 4]).get(0), one.get(0));
    }

    #[test]
    fn a_chain_that_grows_is_that_of_all_its_tokens() {
        let mut grown = chain("s", &[1, 2, 3]);
        grown.extend(&[1, 2, 3, 4, 5, 6], 2);
        assert_eq!(grown.names, chain("s", &[1, 2, 3, 4, 5, 6]).names);
    }

    #[test]
    fn chains_agree_as_far_as_their_tokens_do() {
        let (one, other) = (chain("", &[1, 2, 3, 4]), chain("", &[1, 2, 3, 5]));
        assert!(one.agrees_up_to(&other, 0) && one.agrees_up_to(&other, 1));
        assert!(!one.agrees_up_to(&other, 2));
        assert!(!one.agrees_up_to(&chain("", &[1, 2, 3]), 2), "nothing is known of its second block");
        assert!(!one.agrees_up_to(&chain("salt", &[1, 2]), 0));
    }
}
