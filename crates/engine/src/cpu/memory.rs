//! Memory that kernels read by whole lines of the cache, and that is large: weights and KV. It lies in pages of 2 MiB where the
//! system has them, because a step reads all weights once: with pages of 4 KiB it would wait for the translation of
//! addresses more than for the memory (on a virtual machine, where each takes two walks, that is half the speed).
#![allow(unsafe_code, reason = "numbers of several types share one mapping, each in a part of its own")]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{Advice, MmapMut};

/// Bytes of a line.
const LINE: usize = 64;

/// Bytes of a large page.
const PAGE: usize = 2 << 20;

/// Bytes of a mapping, at least.
const MAPPING: usize = 32 << 20;

/// Numbers that can be zeroed memory.
pub(crate) trait Number: Copy + Default + Send + Sync + 'static {}

impl Number for u8 {}
impl Number for u16 {}
impl Number for f32 {}

/// Hands out memory piece by piece. What it has handed out lives as long as the piece, also without it.
#[derive(Default)]
pub(crate) struct Arena {
    last: Mutex<Option<Rest>>,
}

/// What is left of the mapping that was made last.
struct Rest {
    mapping: Arc<MmapMut>,
    next: NonNull<u8>,
    left: usize,
}

// SAFETY: the pointer is into the mapping, which is memory like any other; nobody else has one to the part that is left.
unsafe impl Send for Rest {}

impl Arena {
    /// So many numbers, all zero. Where the system gives no mapping, they are of the ordinary kind.
    pub(crate) fn take<T: Number>(&self, length: usize) -> Aligned<T> {
        let bytes = (length * size_of::<T>()).next_multiple_of(LINE);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|rest| rest.left < bytes) {
            *last = map(bytes);
        }
        let Some(rest) = last.as_mut() else { return Aligned::new(length) };
        let start = rest.next;
        // SAFETY: as many bytes are left, so that the end of the piece is within the mapping, or at its end.
        rest.next = unsafe { start.add(bytes) };
        rest.left -= bytes;
        Aligned { memory: Memory::Part { _mapping: Arc::clone(&rest.mapping), start: start.cast() }, length }
    }
}

/// Room for so many bytes and more, all zero, from the start of a large page on.
fn map(bytes: usize) -> Option<Rest> {
    let size = bytes.max(MAPPING).next_multiple_of(PAGE);
    let mut mapping = MmapMut::map_anon(size + PAGE).ok()?;
    // Advice: without it memory is as good, and slower.
    let _ = mapping.advise(Advice::HugePage);
    let start = mapping.as_ptr().align_offset(PAGE);
    let part = mapping.get_mut(start..start + size)?;
    let next = NonNull::new(part.as_mut_ptr())?;
    Some(Rest { left: part.len(), next, mapping: Arc::new(mapping) })
}

/// Numbers that start at a line of the cache: a vector read from it never lies on two.
pub(crate) struct Aligned<T> {
    memory: Memory<T>,
    length: usize,
}

enum Memory<T> {
    /// From this number on.
    Own(Vec<T>, usize),
    /// Of a mapping, which it keeps.
    Part { _mapping: Arc<MmapMut>, start: NonNull<T> },
}

// SAFETY: a part of a mapping is its owner's alone: `Arena::take` gives each out once.
unsafe impl<T: Send> Send for Aligned<T> {}
// SAFETY: as above; shared, it is only read.
unsafe impl<T: Sync> Sync for Aligned<T> {}

impl<T: Number> Aligned<T> {
    /// All zero.
    pub(crate) fn new(length: usize) -> Self {
        let memory = vec![T::default(); length + LINE / size_of::<T>()];
        let start = memory.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { memory: Memory::Own(memory, start), length }
    }

    /// Makes room for so many; what they are is not said.
    pub(crate) fn resize(&mut self, length: usize) -> &mut [T] {
        let room = match &self.memory {
            Memory::Own(memory, start) => memory.len() - start,
            Memory::Part { .. } => self.length,
        };
        if room < length {
            *self = Self::new(length);
        }
        self.length = length;
        self
    }
}

impl<T: Number> Default for Aligned<T> {
    fn default() -> Self {
        Self::new(0)
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::Own(memory, start) => &memory[*start..][..self.length],
            // SAFETY: `Arena::take` has set aside so many numbers from here on, aligned to a line, for this owner alone; the
            // mapping began as zeros, which every `Number` can be.
            Memory::Part { start, .. } => unsafe { std::slice::from_raw_parts(start.as_ptr(), self.length) },
        }
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Own(memory, start) => &mut memory[*start..][..self.length],
            // SAFETY: as in `deref`.
            Memory::Part { start, .. } => unsafe {
                std::slice::from_raw_parts_mut(start.as_ptr(), self.length)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_zero_and_aligned() {
        let arena = Arena::default();
        let mut pieces: Vec<Aligned<u16>> = (0..100).map(|piece| arena.take(1 + piece * 20_000)).collect();
        let numbers = arena.take::<f32>(MAPPING);
        drop(arena);
        for (at, piece) in (1..).zip(&mut pieces) {
            assert_eq!(piece.as_ptr().align_offset(LINE), 0);
            assert!(piece.iter().all(|number| *number == 0));
            piece.fill(at);
        }
        for (at, piece) in (1..).zip(&pieces) {
            assert!(piece.iter().all(|number| *number == at), "piece {at}");
        }
        assert!(numbers.len() == MAPPING && numbers.iter().all(|number| number.to_bits() == 0));
    }
}
