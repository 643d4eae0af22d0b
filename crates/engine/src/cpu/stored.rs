//! Numbers in memory that become f32 in registers, and memory that kernels read by whole lines.

use std::ops::{Deref, DerefMut};

use super::e4m3;
use super::isa::{Arithmetic, LANES, PAIR};

/// A stored number of weights, keys or values.
pub(crate) trait Stored: Copy + Default + Send + Sync + 'static {
    /// Where the first or the second number of a lane stands within a pair of inputs.
    fn place(lane: usize, second: usize) -> usize;
    /// One number.
    fn decode(self) -> f32;
    /// The first numbers of all lanes, and the second ones.
    fn load<A: Arithmetic>(pair: &[Self; PAIR]) -> [A::Vector; 2];
}

impl Stored for f32 {
    #[inline(always)]
    fn place(lane: usize, second: usize) -> usize {
        second * LANES + lane
    }

    #[inline(always)]
    fn decode(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<A: Arithmetic>(pair: &[f32; PAIR]) -> [A::Vector; 2] {
        let (lanes, _) = pair.as_chunks();
        [A::load(&lanes[0]), A::load(&lanes[1])]
    }
}

/// Bits of a bf16: plain integers start as zeroed pages, which cost no memory until they are written.
impl Stored for u16 {
    #[inline(always)]
    fn place(lane: usize, second: usize) -> usize {
        2 * lane + second
    }

    #[inline(always)]
    fn decode(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    fn load<A: Arithmetic>(pair: &[u16; PAIR]) -> [A::Vector; 2] {
        A::load_bf16(pair)
    }
}

/// An e4m3 code that is not NaN.
impl Stored for u8 {
    #[inline(always)]
    fn place(lane: usize, second: usize) -> usize {
        2 * lane + second
    }

    #[inline(always)]
    fn decode(self) -> f32 {
        e4m3::decode_finite(self)
    }

    #[inline(always)]
    fn load<A: Arithmetic>(pair: &[u8; PAIR]) -> [A::Vector; 2] {
        A::load_e4m3(pair)
    }
}

/// Numbers that start at a line of the cache: a vector read from it never lies on two.
pub(crate) struct Aligned<T> {
    memory: Vec<T>,
    start: usize,
    length: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// All zero.
    pub(crate) fn new(length: usize) -> Self {
        const LINE: usize = 64;
        let memory = vec![T::default(); length + LINE / size_of::<T>()];
        let start = memory.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { memory, start, length }
    }

    /// Makes room for so many; what they are is not said.
    pub(crate) fn resize(&mut self, length: usize) -> &mut [T] {
        if self.memory.len() < self.start + length {
            *self = Self::new(length);
        }
        self.length = length;
        self
    }
}

impl<T: Copy + Default> Default for Aligned<T> {
    fn default() -> Self {
        Self::new(0)
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..][..self.length]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.length]
    }
}
