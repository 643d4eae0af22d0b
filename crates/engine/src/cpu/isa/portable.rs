//! Plain Rust, for every CPU. A product that is added is rounded twice.

use super::{Arithmetic, LANES, PAIR};
use crate::cpu::e4m3;

#[derive(Clone, Copy)]
pub(super) struct Unfused;

impl Arithmetic for Unfused {
    type Vector = [f32; LANES];

    const WIDE: bool = false;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    fn mul_add_lanes(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn splat(value: f32) -> [f32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    #[inline(always)]
    fn load_bf16(pairs: &[u16; PAIR]) -> [[f32; LANES]; 2] {
        let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        [0, 1].map(|parity| std::array::from_fn(|lane| widen(pairs[2 * lane + parity])))
    }

    #[inline(always)]
    fn load_e4m3(pairs: &[u8; PAIR]) -> [[f32; LANES]; 2] {
        [0, 1].map(|parity| std::array::from_fn(|lane| e4m3::decode_finite(pairs[2 * lane + parity])))
    }

    #[inline(always)]
    fn store(vector: [f32; LANES], values: &mut [f32; LANES]) {
        *values = vector;
    }
}
