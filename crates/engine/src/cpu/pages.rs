//! The KV cache of one rank in memory: blocks of [`BLOCK_TOKENS`] tokens, each layer of a block under its own lock, so that
//! transfers read and write beside a running step.

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use half::bf16;
use herd_model::BLOCK_TOKENS;

use super::isa::Stored;
use crate::{KvError, KvSlab, KvStore};

/// A number of the cache.
pub(crate) trait KvElement: Stored + Default {
    /// Of one number, little endian.
    type Bytes: AsRef<[u8]> + for<'a> TryFrom<&'a [u8]>;
    fn encode(value: f32) -> Self;
    fn to_bytes(self) -> Self::Bytes;
    fn from_bytes(bytes: Self::Bytes) -> Self;
}

impl KvElement for f32 {
    type Bytes = [u8; 4];

    fn encode(value: f32) -> Self {
        value
    }

    fn to_bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 4]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

/// The bits of a bf16: plain integers start as zeroed pages, which cost no memory until they are written.
impl KvElement for u16 {
    type Bytes = [u8; 2];

    fn encode(value: f32) -> Self {
        bf16::from_f32(value).to_bits()
    }

    fn to_bytes(self) -> [u8; 2] {
        self.to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 2]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

/// Sizes of a rank's cache.
#[derive(Clone, Debug)]
pub(crate) struct PageLayout {
    pub(crate) blocks: usize,
    /// Slots of the host pool, numbered after the blocks. This rank's memory is the host's: they are no different.
    pub(crate) host_blocks: usize,
    /// Absolute, as everywhere here.
    pub(crate) layers: Range<usize>,
    /// Absolute KV heads.
    pub(crate) heads: Range<usize>,
    pub(crate) head_dim: usize,
}

pub(crate) struct Pages<T> {
    layout: PageLayout,
    /// `[block, layer]`; each `[2, heads, BLOCK_TOKENS, head_dim]`: keys, then values.
    slabs: Vec<RwLock<Box<[T]>>>,
}

impl<T: KvElement> Pages<T> {
    pub(crate) fn new(layout: PageLayout) -> Self {
        let numbers = 2 * layout.heads.len() * BLOCK_TOKENS * layout.head_dim;
        let slab = || RwLock::new(vec![T::default(); numbers].into_boxed_slice());
        let slabs = (layout.blocks + layout.host_blocks) * layout.layers.len();
        let slabs = (0..slabs).map(|_| slab()).collect();
        Self { layout, slabs }
    }

    /// One layer of a block, to read: `[2, heads, BLOCK_TOKENS, head_dim]`.
    pub(crate) fn slab(&self, block: u32, layer: usize) -> RwLockReadGuard<'_, Box<[T]>> {
        self.lock(block, layer).read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the keys and values of the token in row `token` of a block; each `[heads, head_dim]`.
    pub(crate) fn put(&self, block: u32, layer: usize, token: usize, keys: &[f32], values: &[f32]) {
        let mut slab = self.lock(block, layer).write().unwrap_or_else(PoisonError::into_inner);
        let heads = keys.chunks_exact(self.layout.head_dim).chain(values.chunks_exact(self.layout.head_dim));
        for (head, row) in heads.enumerate() {
            let place = &mut slab[self.row(head, token)];
            place.iter_mut().zip(row).for_each(|(place, value)| *place = T::encode(*value));
        }
    }

    /// Copies rows `0..tokens` of all layers and heads from one block or slot of the host pool to another one.
    pub(crate) fn copy_rows(&self, from: u32, to: u32, tokens: usize) {
        for layer in self.layout.layers.clone() {
            let source = self.slab(from, layer);
            let mut target = self.lock(to, layer).write().unwrap_or_else(PoisonError::into_inner);
            for rows in self.rows(&self.layout.heads, tokens) {
                target[rows.clone()].copy_from_slice(&source[rows]);
            }
        }
    }

    fn lock(&self, block: u32, layer: usize) -> &RwLock<Box<[T]>> {
        let layers = &self.layout.layers;
        &self.slabs[block as usize * layers.len() + layer - layers.start]
    }

    /// Where a token's row of a head lies in a slab; heads of keys are counted first, then those of values.
    fn row(&self, head: usize, token: usize) -> Range<usize> {
        let from = (head * BLOCK_TOKENS + token) * self.layout.head_dim;
        from..from + self.layout.head_dim
    }

    /// Where rows `0..tokens` of `heads` lie in a slab: keys by head, then values by head.
    fn rows(&self, heads: &Range<usize>, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let held = &self.layout.heads;
        let head_dim = self.layout.head_dim;
        let (from, to) = (heads.start - held.start, heads.end - held.start);
        let values = from + held.len()..to + held.len();
        (from..to).chain(values).map(move |head| {
            let from = head * BLOCK_TOKENS * head_dim;
            from..from + tokens * head_dim
        })
    }

    fn check(&self, block: u32, layer: usize, heads: &Range<usize>) -> Result<(), KvError> {
        let PageLayout { blocks, layers, heads: held, .. } = &self.layout;
        if block as usize >= *blocks {
            return Err(KvError::NoSuchBlock { block, blocks: *blocks as u32 });
        }
        if !layers.contains(&layer) {
            return Err(KvError::NoSuchLayer { layer, held: layers.clone() });
        }
        if heads.is_empty() || heads.start < held.start || heads.end > held.end {
            return Err(KvError::NoSuchHeads { asked: heads.clone(), held: held.clone() });
        }
        Ok(())
    }
}

impl<T: KvElement> KvStore for Pages<T> {
    fn layers(&self) -> Range<usize> {
        self.layout.layers.clone()
    }

    fn heads(&self) -> Range<usize> {
        self.layout.heads.clone()
    }

    fn row_bytes(&self) -> usize {
        self.layout.head_dim * size_of::<T>()
    }

    fn read(&self, block: u32, layer: usize, heads: Range<usize>, tokens: usize) -> Result<KvSlab, KvError> {
        self.check(block, layer, &heads)?;
        let size = 2 * heads.len() * self.row_bytes();
        if tokens > BLOCK_TOKENS {
            return Err(KvError::BadLength { bytes: tokens.saturating_mul(size) });
        }
        let slab = self.slab(block, layer);
        let mut bytes = Vec::with_capacity(tokens * size);
        for rows in self.rows(&heads, tokens) {
            slab[rows].iter().for_each(|number| bytes.extend_from_slice(number.to_bytes().as_ref()));
        }
        Ok(KvSlab { layer, heads, bytes })
    }

    fn write(&self, block: u32, slab: &KvSlab) -> Result<(), KvError> {
        let KvSlab { layer, heads, bytes } = slab;
        self.check(block, *layer, heads)?;
        let size = 2 * heads.len() * self.row_bytes();
        let tokens = bytes.len() / size;
        if tokens * size != bytes.len() || tokens > BLOCK_TOKENS {
            return Err(KvError::BadLength { bytes: bytes.len() });
        }
        let mut slab = self.lock(block, *layer).write().unwrap_or_else(PoisonError::into_inner);
        let mut numbers = bytes.chunks_exact(size_of::<T>());
        for rows in self.rows(heads, tokens) {
            for (place, bytes) in slab[rows].iter_mut().zip(&mut numbers) {
                if let Ok(bytes) = T::Bytes::try_from(bytes) {
                    *place = T::from_bytes(bytes);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> Pages<f32> {
        Pages::new(PageLayout { blocks: 3, host_blocks: 1, layers: 4..6, heads: 2..4, head_dim: 2 })
    }

    #[test]
    fn heads_leave_and_enter_by_absolute_number() {
        let pages = pages();
        pages.put(1, 5, 0, &[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]);
        pages.put(1, 5, 1, &[11.0, 12.0, 13.0, 14.0], &[15.0, 16.0, 17.0, 18.0]);
        let slab = pages.read(1, 5, 3..4, 2).unwrap();
        let numbers: Vec<_> =
            slab.bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        assert_eq!(numbers, [3.0, 4.0, 13.0, 14.0, 7.0, 8.0, 17.0, 18.0]);

        pages.write(2, &slab).unwrap();
        assert_eq!(pages.read(2, 5, 3..4, 2), Ok(slab));
        assert!(pages.read(2, 5, 2..3, 64).unwrap().bytes.iter().all(|&byte| byte == 0));
        assert!(pages.read(2, 4, 2..4, 64).unwrap().bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn rows_are_copied_in_all_layers_and_no_more_than_asked_for() {
        let pages = pages();
        for (block, layer, token) in [(0, 4, 0), (0, 5, 1), (0, 5, 2), (2, 5, 1), (2, 5, 2)] {
            let value = (10 * block + layer + token) as f32;
            pages.put(block as u32, layer, token, &[value; 4], &[-value; 4]);
        }
        let (source, before) = (pages.read(0, 5, 2..4, 3).unwrap(), pages.read(2, 5, 2..4, 3).unwrap());
        // Through the host pool.
        pages.copy_rows(0, 3, 64);
        pages.copy_rows(3, 2, 2);
        let target = pages.read(2, 5, 2..4, 3).unwrap();
        for (row, (target, source)) in target.bytes.chunks(8).zip(source.bytes.chunks(8)).enumerate() {
            let kept = &before.bytes[8 * row..8 * row + 8];
            assert_eq!(target, if row % 3 < 2 { source } else { kept }, "row {row}");
        }
        assert_eq!(pages.read(2, 4, 2..4, 1), pages.read(0, 4, 2..4, 1));
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let pages = pages();
        assert_eq!(pages.read(3, 4, 2..4, 1), Err(KvError::NoSuchBlock { block: 3, blocks: 3 }));
        for layer in [0, 3, 6] {
            assert_eq!(pages.read(0, layer, 2..4, 1), Err(KvError::NoSuchLayer { layer, held: 4..6 }));
        }
        assert_eq!(pages.read(0, 4, 1..4, 1), Err(KvError::NoSuchHeads { asked: 1..4, held: 2..4 }));
        assert_eq!(pages.read(0, 4, 2..4, 65), Err(KvError::BadLength { bytes: 65 * 32 }));
        for bytes in [31, 33, 65 * 32] {
            let slab = KvSlab { layer: 4, heads: 2..4, bytes: vec![0; bytes] };
            assert_eq!(pages.write(0, &slab), Err(KvError::BadLength { bytes }));
        }
    }
}
