//! Numbers in memory that become f32 in registers.

use super::e4m3;
use super::isa::{Arithmetic, LANES, PAIR};
use super::memory::Number;

/// A stored number of weights, keys or values.
pub(crate) trait Stored: Number {
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
