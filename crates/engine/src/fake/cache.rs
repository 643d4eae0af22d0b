//! The KV cache of one rank of the fake backend.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::FakeOptions;
use crate::{KvError, KvSlab, KvStore};

/// The finalizer of `SplitMix64` (Steele, Lea and Flood 2014): a bijection that changes half the bits for any changed one.
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Goes on hashing; the order counts.
pub(super) fn absorb(hash: u64, value: u64) -> u64 {
    mix(hash.rotate_left(5) ^ mix(value))
}

fn absorb_bytes(hash: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(hash, |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        absorb(hash, u64::from_le_bytes(word))
    })
}

#[derive(Debug)]
pub(super) struct FakeCache {
    heads: Range<usize>,
    layers: usize,
    row_bytes: usize,
    block_tokens: usize,
    /// Those that are blocks; the host pool comes after them.
    kv_blocks: usize,
    /// Each `[layers, 2, heads, block_tokens, row_bytes]`.
    blocks: Vec<Mutex<Vec<u8>>>,
}

impl FakeCache {
    pub(super) fn new(options: &FakeOptions, rank: usize) -> Self {
        let &FakeOptions {
            tensor, layers, kv_heads, row_bytes, kv_blocks, host_blocks, block_tokens, ..
        } = options;
        let heads = rank * kv_heads / tensor..((rank + 1) * kv_heads).div_ceil(tensor);
        let bytes = layers * 2 * heads.len() * block_tokens * row_bytes;
        let blocks = (0..kv_blocks + host_blocks).map(|_| Mutex::new(vec![0; bytes])).collect();
        Self { heads, layers, row_bytes, block_tokens, kv_blocks, blocks }
    }

    fn block(&self, block: u32) -> Result<MutexGuard<'_, Vec<u8>>, KvError> {
        let blocks = self.kv_blocks as u32;
        let held = self.blocks.get(block as usize).filter(|_| block < blocks);
        let held = held.ok_or(KvError::NoSuchBlock { block, blocks })?;
        Ok(held.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Copies rows `0..rows` of everything from one block or slot of the host pool to another.
    pub(super) fn copy_rows(&self, from: u32, to: u32, rows: usize) {
        let block = |block: u32| self.blocks.get(block as usize);
        let (Some(from), Some(to)) = (block(from), block(to)) else { return };
        let from = from.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in 0..self.layers {
            for part in 0..2 {
                for head in self.heads.clone() {
                    let rows = self.rows(layer, part, head, 0..rows);
                    to[rows.clone()].copy_from_slice(&from[rows]);
                }
            }
        }
    }

    /// Where rows `0..tokens` of one head lie in a block; `part` is 0 for keys, 1 for values. `head` is absolute.
    fn rows(&self, layer: usize, part: usize, head: usize, tokens: Range<usize>) -> Range<usize> {
        let first = ((layer * 2 + part) * self.heads.len() + head - self.heads.start) * self.block_tokens;
        (first + tokens.start) * self.row_bytes..(first + tokens.end) * self.row_bytes
    }

    /// Writes the row of a position: every layer, head, key and value.
    pub(super) fn compute(&self, table: &[u32], position: usize, token: u32, seed: u64) {
        let (at, row) = (position / self.block_tokens, position % self.block_tokens);
        // The row before, which may lie in the block before, is part of the hash: so is everything that came earlier.
        let before = position.checked_sub(1).map_or_else(Vec::new, |before| self.row_hashes(table, before));
        let mut before = before.into_iter();
        let Some(Ok(mut block)) = table.get(at).map(|&block| self.block(block)) else { return };
        for layer in 0..self.layers {
            for part in 0..2 {
                for head in self.heads.clone() {
                    let place = [u64::from(token), position as u64, layer as u64, part as u64, head as u64];
                    let mut hash = place.into_iter().fold(seed, absorb);
                    hash = absorb(hash, before.next().unwrap_or_default());
                    for word in block[self.rows(layer, part, head, row..row + 1)].chunks_mut(8) {
                        word.copy_from_slice(&hash.to_le_bytes()[..word.len()]);
                        hash = mix(hash);
                    }
                }
            }
        }
    }

    /// Hash of each row of a position.
    fn row_hashes(&self, table: &[u32], position: usize) -> Vec<u64> {
        let (at, row) = (position / self.block_tokens, position % self.block_tokens);
        let Some(Ok(block)) = table.get(at).map(|&block| self.block(block)) else { return Vec::new() };
        let mut hashes = Vec::with_capacity(self.layers * 2 * self.heads.len());
        for layer in 0..self.layers {
            for part in 0..2 {
                for head in self.heads.clone() {
                    hashes.push(absorb_bytes(0, &block[self.rows(layer, part, head, row..row + 1)]));
                }
            }
        }
        hashes
    }

    /// Hash of all rows of a head at positions `0..positions`.
    pub(super) fn digest(&self, table: &[u32], positions: usize, head: usize) -> u64 {
        let mut digest = head as u64;
        for (at, &block) in table.iter().enumerate() {
            let tokens = positions.saturating_sub(at * self.block_tokens).min(self.block_tokens);
            let Ok(block) = self.block(block) else { return digest };
            for layer in 0..self.layers {
                for part in 0..2 {
                    digest = absorb_bytes(digest, &block[self.rows(layer, part, head, 0..tokens)]);
                }
            }
        }
        digest
    }

    fn check(&self, layer: usize, heads: &Range<usize>) -> Result<(), KvError> {
        if layer >= self.layers {
            return Err(KvError::NoSuchLayer { layer, held: 0..self.layers });
        }
        if heads.is_empty() || heads.start < self.heads.start || heads.end > self.heads.end {
            return Err(KvError::NoSuchHeads { asked: heads.clone(), held: self.heads.clone() });
        }
        Ok(())
    }
}

impl KvStore for FakeCache {
    fn layers(&self) -> Range<usize> {
        0..self.layers
    }

    fn heads(&self) -> Range<usize> {
        self.heads.clone()
    }

    fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    fn read(&self, block: u32, layer: usize, heads: Range<usize>, tokens: usize) -> Result<KvSlab, KvError> {
        let block = self.block(block)?;
        self.check(layer, &heads)?;
        let mut bytes = Vec::with_capacity(2 * heads.len() * tokens * self.row_bytes);
        if tokens > self.block_tokens {
            return Err(KvError::BadLength { bytes: bytes.capacity() });
        }
        for part in 0..2 {
            for head in heads.clone() {
                bytes.extend_from_slice(&block[self.rows(layer, part, head, 0..tokens)]);
            }
        }
        Ok(KvSlab { layer, heads, bytes })
    }

    fn write(&self, block: u32, slab: &KvSlab) -> Result<(), KvError> {
        let KvSlab { layer, heads, bytes } = slab;
        let mut block = self.block(block)?;
        self.check(*layer, heads)?;
        let row = 2 * heads.len() * self.row_bytes;
        let tokens = bytes.len() / row;
        if bytes.len() % row != 0 || tokens > self.block_tokens {
            return Err(KvError::BadLength { bytes: bytes.len() });
        }
        if tokens == 0 {
            return Ok(());
        }
        let mut runs = bytes.chunks_exact(tokens * self.row_bytes);
        for part in 0..2 {
            for head in heads.clone() {
                if let Some(run) = runs.next() {
                    block[self.rows(*layer, part, head, 0..tokens)].copy_from_slice(run);
                }
            }
        }
        Ok(())
    }
}
