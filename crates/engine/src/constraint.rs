//! What keeps a choice to a grammar, as far as the sampler has to know: token ids in, token ids out. Whoever has the tokenizer
//! makes it.

use std::fmt::Debug;

/// A set of token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `id % 32` of word `id / 32`.
    words: Vec<u32>,
}

impl TokenMask {
    /// None of `vocab_size` ids.
    pub fn none(vocab_size: usize) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(32)] }
    }

    /// Bit `id % 32` of word `id / 32` says whether the set has `id`; bits from `vocab_size` on are left out.
    pub fn from_words(words: &[u32], vocab_size: usize) -> Self {
        let mut mask = Self { words: words.iter().copied().take(vocab_size.div_ceil(32)).collect() };
        if let (Some(last), used @ 1..) = (mask.words.get_mut(vocab_size / 32), vocab_size % 32) {
            *last &= (1 << used) - 1;
        }
        mask
    }

    /// Adds an id below the vocabulary size; others are left out.
    pub fn allow(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }

    /// Whether the set has `id`.
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Whether it has no id at all.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether it has an id that is not one of these.
    pub(crate) fn has_other_than(&self, ids: &[u32]) -> bool {
        let others = |(at, word): (usize, &u32)| {
            ids.iter().filter(|id| **id as usize / 32 == at).fold(*word, |word, id| word & !(1 << (id % 32)))
        };
        self.words.iter().enumerate().map(others).any(|word| word != 0)
    }
}

/// The state of a grammar after the tokens of a choice so far. A function of the grammar and these tokens alone, so that
/// it can be replayed anywhere.
///
/// Called on the thread of the step loop: each call has to be bounded.
pub trait Constraint: Debug + Send + Sync {
    /// Tokens of text that may come next. A stop token is among them only if its text is.
    fn allowed(&mut self) -> Result<TokenMask, ConstraintError>;

    /// Whether the text may end here.
    fn can_end(&self) -> bool;

    /// Whether the text may end here and no token can follow.
    fn is_complete(&self) -> bool;

    /// Takes the next token.
    fn advance(&mut self, token: u32) -> Result<(), ConstraintError>;

    /// A copy that goes on by itself.
    fn boxed_clone(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}

/// A choice that cannot go on under its constraint: nothing can follow, or its state has become too large to compute with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_what_was_allowed_and_nothing_past_the_vocabulary() {
        let mut mask = TokenMask::none(40);
        assert!(mask.is_empty());
        for id in [0, 31, 39] {
            mask.allow(id);
        }
        let ids: Vec<u32> = (0..80).filter(|id| mask.contains(*id)).collect();
        assert_eq!(ids, [0, 31, 39]);
        assert!(mask.has_other_than(&[0, 31]));
        assert!(!mask.has_other_than(&[39, 0, 31, 500]));
        let all = TokenMask::from_words(&[u32::MAX; 3], 40);
        assert_eq!((0..100).filter(|id| all.contains(*id)).count(), 40);
        assert_eq!(TokenMask::from_words(&[u32::MAX; 3], 64), TokenMask::from_words(&[u32::MAX; 2], 64));
    }
}
