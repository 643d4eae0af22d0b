//! The KV cache of one rank in memory: blocks of [`BLOCK_TOKENS`] tokens, each layer of a block under its own lock, so that
//! transfers read and write beside a running step. Keys and values are stored as panels that attention multiplies with as
//! they are; what leaves and enters is in the order of tokens.

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use half::bf16;
use herd_model::BLOCK_TOKENS;

use super::isa::{Isa, LANES, PAIR};
use super::memory::{Aligned, Arena};
use super::packed::padded;
use super::product::{Bf16Product, Out, PairProduct, Panels};
use super::stored::Stored;
use crate::{KvError, KvSlab, KvStore};

/// A number of the cache.
pub(crate) trait KvElement: Stored {
    /// Of one number, little endian.
    type Bytes: AsRef<[u8]> + for<'a> TryFrom<&'a [u8]>;
    fn encode(value: f32) -> Self;
    fn to_bytes(self) -> Self::Bytes;
    fn from_bytes(bytes: Self::Bytes) -> Self;
    /// Whether rows that are multiplied with it are bf16.
    fn takes_bf16(isa: Isa) -> bool;
    /// The product of rows, `wide` or `bf16` ones, with keys or values.
    fn multiply(isa: Isa, rows: KvRows<'_>, panels: Panels<'_, Self>, out: Out<'_>, add: bool);
}

/// Rows that keys or values are multiplied with.
pub(crate) struct KvRows<'a> {
    pub(crate) wide: &'a [f32],
    /// Used where [`KvElement::takes_bf16`].
    pub(crate) bf16: &'a [u16],
    pub(crate) row_stride: usize,
    pub(crate) count: usize,
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

    fn takes_bf16(_: Isa) -> bool {
        false
    }

    fn multiply(isa: Isa, rows: KvRows<'_>, panels: Panels<'_, f32>, out: Out<'_>, add: bool) {
        let KvRows { wide: rows, bf16: _, row_stride, count } = rows;
        isa.run(PairProduct { rows, row_stride, count, panels, out, add });
    }
}

/// The bits of a bf16.
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

    fn takes_bf16(isa: Isa) -> bool {
        isa.has_bf16()
    }

    fn multiply(isa: Isa, rows: KvRows<'_>, panels: Panels<'_, u16>, out: Out<'_>, add: bool) {
        let KvRows { wide, bf16, row_stride, count } = rows;
        if isa.has_bf16() {
            isa.multiply_bf16(Bf16Product { rows: bf16, row_stride, count, panels, out, add });
        } else {
            isa.run(PairProduct { rows: wide, row_stride, count, panels, out, add });
        }
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

impl PageLayout {
    /// Numbers of the keys, or the values, of a head in a block.
    fn head(&self) -> usize {
        BLOCK_TOKENS * padded(self.head_dim)
    }
}

pub(crate) struct Pages<T> {
    layout: PageLayout,
    /// `[block, layer]`; each keys, then values, by head. Keys of a head are `[pair of numbers of a key, panel of tokens]`,
    /// values `[pair of tokens, panel of numbers of a value]`; a number of padding is zero.
    slabs: Vec<RwLock<Aligned<T>>>,
}

/// One layer of a block, to read.
pub(crate) struct Slab<'a, T> {
    slab: RwLockReadGuard<'a, Aligned<T>>,
    layout: &'a PageLayout,
}

/// One layer of a block, to write.
pub(crate) struct SlabMut<'a, T> {
    slab: RwLockWriteGuard<'a, Aligned<T>>,
    layout: &'a PageLayout,
}

/// Panels of the tokens of a block.
const TOKEN_PANELS: usize = BLOCK_TOKENS / LANES;

impl<T: KvElement> Slab<'_, T> {
    /// Keys of the first `panels` panels of tokens, by pairs of the numbers of a key. Of a head of this rank.
    pub(crate) fn keys(&self, head: usize, panels: usize) -> Panels<'_, T> {
        let values = &self.slab[head * self.layout.head()..][..self.layout.head()];
        Panels {
            values: values.as_chunks().0,
            pair_stride: TOKEN_PANELS,
            panel_stride: 1,
            count: panels,
            pairs: padded(self.layout.head_dim) / 2,
        }
    }

    /// Values of the first `pairs` pairs of tokens.
    pub(crate) fn values(&self, head: usize, pairs: usize) -> Panels<'_, T> {
        let head = self.layout.heads.len() + head;
        let values = &self.slab[head * self.layout.head()..][..self.layout.head()];
        let panels = padded(self.layout.head_dim) / LANES;
        Panels { values: values.as_chunks().0, pair_stride: panels, panel_stride: 1, count: panels, pairs }
    }
}

impl<T: KvElement> SlabMut<'_, T> {
    /// Writes the keys and values of a token; each `[heads, head_dim]`. The first token of a block makes it a new one.
    pub(crate) fn put(&mut self, token: usize, keys: &[f32], values: &[f32]) {
        let PageLayout { heads, head_dim, .. } = self.layout;
        if token == 0 {
            self.forget(0);
        }
        for (head, row) in keys.chunks_exact(*head_dim).enumerate() {
            let pairs = self.head(head);
            for (number, value) in row.iter().enumerate() {
                let (at, place) = key_place::<T>(number, token);
                pairs[at][place] = T::encode(*value);
            }
        }
        for (head, row) in values.chunks_exact(*head_dim).enumerate() {
            let (panels, heads) = (padded(*head_dim) / LANES, heads.len());
            let pairs = self.head(heads + head);
            for (number, value) in row.iter().enumerate() {
                let (at, place) = value_place::<T>(number, token, panels);
                pairs[at][place] = T::encode(*value);
            }
        }
    }

    /// Makes the values of tokens from this one on zero: they are multiplied by zero as long as nobody attends to them, and
    /// so have to be numbers.
    fn forget(&mut self, token: usize) {
        let PageLayout { heads, head_dim, .. } = self.layout;
        let panels = padded(*head_dim) / LANES;
        for head in heads.len()..2 * heads.len() {
            let pairs = self.head(head);
            let whole = token.div_ceil(2) * panels;
            for pair in &mut pairs[token / 2 * panels..whole] {
                (0..LANES).for_each(|lane| pair[T::place(lane, 1)] = T::default());
            }
            pairs[whole..].as_flattened_mut().fill(T::default());
        }
    }

    /// Keys of a head, or, after those, values.
    fn head(&mut self, head: usize) -> &mut [[T; PAIR]] {
        let size = self.layout.head();
        self.slab[head * size..][..size].as_chunks_mut().0
    }
}

/// Where a number of a token's key stands: in which pair, and where there.
#[inline(always)]
fn key_place<T: Stored>(number: usize, token: usize) -> (usize, usize) {
    (number / 2 * TOKEN_PANELS + token / LANES, T::place(token % LANES, number % 2))
}

/// Where a number of a token's value stands, of so many panels.
#[inline(always)]
fn value_place<T: Stored>(number: usize, token: usize, panels: usize) -> (usize, usize) {
    (token / 2 * panels + number / LANES, T::place(number % LANES, token % 2))
}

impl<T: KvElement> Pages<T> {
    pub(crate) fn new(layout: PageLayout) -> Self {
        let numbers = 2 * layout.heads.len() * layout.head();
        let slabs = (layout.blocks + layout.host_blocks) * layout.layers.len();
        let arena = Arena::default();
        let slabs = (0..slabs).map(|_| RwLock::new(arena.take(numbers)));
        Self { slabs: slabs.collect(), layout }
    }

    /// One layer of a block, to read.
    pub(crate) fn slab(&self, block: u32, layer: usize) -> Slab<'_, T> {
        let slab = self.lock(block, layer).read().unwrap_or_else(PoisonError::into_inner);
        Slab { slab, layout: &self.layout }
    }

    /// One layer of a block, to write.
    pub(crate) fn slab_mut(&self, block: u32, layer: usize) -> SlabMut<'_, T> {
        let slab = self.lock(block, layer).write().unwrap_or_else(PoisonError::into_inner);
        SlabMut { slab, layout: &self.layout }
    }

    /// Copies rows `0..tokens` of all layers and heads from one block or slot of the host pool to another one, which keeps
    /// nothing of what it had.
    pub(crate) fn copy_rows(&self, from: u32, to: u32, tokens: usize) {
        for layer in self.layout.layers.clone() {
            let source = self.slab(from, layer);
            let mut target = self.slab_mut(to, layer);
            target.slab.copy_from_slice(&source.slab);
            target.forget(tokens);
        }
    }

    fn lock(&self, block: u32, layer: usize) -> &RwLock<Aligned<T>> {
        let layers = &self.layout.layers;
        &self.slabs[block as usize * layers.len() + layer - layers.start]
    }

    /// The heads of a range as counted here, of keys, then of values, and whether it is values.
    fn sides(&self, heads: &Range<usize>) -> impl Iterator<Item = (usize, bool)> + use<T> {
        let held = &self.layout.heads;
        let (from, to) = (heads.start - held.start, heads.end - held.start);
        let values = from + held.len()..to + held.len();
        (from..to).map(|head| (head, false)).chain(values.map(|head| (head, true)))
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
        let Slab { slab, layout } = self.slab(block, layer);
        let panels = padded(layout.head_dim) / LANES;
        let mut bytes = Vec::with_capacity(tokens * size);
        for (head, values) in self.sides(&heads) {
            let pairs = slab[head * layout.head()..][..layout.head()].as_chunks::<PAIR>().0;
            for token in 0..tokens {
                for number in 0..layout.head_dim {
                    let (at, place) = if values {
                        value_place::<T>(number, token, panels)
                    } else {
                        key_place::<T>(number, token)
                    };
                    bytes.extend_from_slice(pairs[at][place].to_bytes().as_ref());
                }
            }
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
        let mut slab = self.slab_mut(block, *layer);
        let PageLayout { head_dim, .. } = self.layout;
        let panels = padded(head_dim) / LANES;
        let mut numbers = bytes.chunks_exact(size_of::<T>());
        for (head, values) in self.sides(heads) {
            let pairs = slab.head(head);
            if values {
                // What lies beyond these tokens is of no earlier sequence: see `SlabMut::forget`.
                pairs[tokens / 2 * panels..].as_flattened_mut().fill(T::default());
            }
            for token in 0..tokens {
                for (number, bytes) in (0..head_dim).zip(&mut numbers) {
                    let (at, place) = if values {
                        value_place::<T>(number, token, panels)
                    } else {
                        key_place::<T>(number, token)
                    };
                    if let Ok(bytes) = T::Bytes::try_from(bytes) {
                        pairs[at][place] = T::from_bytes(bytes);
                    }
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
        pages.slab_mut(1, 5).put(0, &[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]);
        pages.slab_mut(1, 5).put(1, &[11.0, 12.0, 13.0, 14.0], &[15.0, 16.0, 17.0, 18.0]);
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
    fn rows_are_copied_in_all_layers_and_values_no_further_than_asked_for() {
        let pages = pages();
        for (block, layer, token) in [(0, 4, 0), (0, 5, 1), (0, 5, 2), (2, 5, 1), (2, 5, 2)] {
            let value = (10 * block + layer + token) as f32;
            pages.slab_mut(block as u32, layer).put(token, &[value; 4], &[-value; 4]);
        }
        for rows in [1, 2] {
            // Through the host pool.
            pages.copy_rows(0, 3, 64);
            pages.copy_rows(3, 2, rows);
            let source = pages.read(0, 5, 2..4, 3).unwrap();
            let target = pages.read(2, 5, 2..4, 3).unwrap();
            for (row, (target, source)) in target.bytes.chunks(8).zip(source.bytes.chunks(8)).enumerate() {
                // Keys of two heads, then their values.
                if row % 3 < rows {
                    assert_eq!(target, source, "row {row}");
                } else {
                    assert!(row < 6 || target.iter().all(|byte| *byte == 0), "row {row}");
                }
            }
            assert_eq!(pages.read(2, 4, 2..4, 1), pages.read(0, 4, 2..4, 1));
        }
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
