//! The paged KV cache as others see it: blocks that can be read and written one layer and one range of heads at a time.

use std::ops::Range;

/// One layer of one block, for a range of KV heads: what a frame on the wire carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSlab {
    /// Absolute layer.
    pub layer: usize,
    /// Absolute KV heads, the same numbers on every rank of every tensor degree.
    pub heads: Range<usize>,
    /// Keys of all heads, then values of all heads: `[2, heads, tokens, head_dim]` in the cache's dtype, little endian.
    /// `tokens` is the number of rows asked for, counted from the start of the block.
    pub bytes: Vec<u8>,
}

/// The KV cache of one rank. Reads and writes may run beside a step that works on other blocks; who calls them makes sure
/// that a block read is complete and a block written is reserved.
pub trait KvStore: Send + Sync {
    /// Absolute layers this rank holds.
    fn layers(&self) -> Range<usize>;

    /// Absolute KV heads this rank holds.
    fn heads(&self) -> Range<usize>;

    /// Bytes one row of one head takes, keys or values alone: `head_dim` times the size of the dtype.
    fn row_bytes(&self) -> usize;

    /// Copies rows `0..tokens` of a block out.
    fn read(&self, block: u32, layer: usize, heads: Range<usize>, tokens: usize) -> Result<KvSlab, KvError>;

    /// Copies rows `0..tokens` into a block; `tokens` follows from the slab's length.
    fn write(&self, block: u32, slab: &KvSlab) -> Result<(), KvError>;
}

/// A read or write that names what is not there.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KvError {
    /// Not a block of this cache.
    #[error("kv block {block} is not one of the {blocks} of this rank")]
    NoSuchBlock {
        /// Asked for.
        block: u32,
        /// Blocks there are.
        blocks: u32,
    },
    /// Not a layer of this cache.
    #[error("layer {layer} is not within {held:?} of this rank")]
    NoSuchLayer {
        /// Asked for.
        layer: usize,
        /// Layers there are.
        held: Range<usize>,
    },
    /// Heads that this rank does not hold.
    #[error("kv heads {asked:?} are not within {held:?} of this rank")]
    NoSuchHeads {
        /// Asked for.
        asked: Range<usize>,
        /// Heads there are.
        held: Range<usize>,
    },
    /// A slab whose length is no whole number of rows, or more rows than a block has.
    #[error("slab of {bytes} bytes does not fit a block of this rank")]
    BadLength {
        /// Given.
        bytes: usize,
    },
}
