//! What happens to rows between two linears: norm, rotation, gate, rounding. Each row by itself.

use half::bf16;
use rayon::prelude::*;

use super::e4m3;
use super::isa::{Arithmetic, Isa, Kernel, LANES};

/// Numbers below which threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 14;

/// Calls `work` with the number of each row of `width` and the row, on all threads where there are many.
pub(crate) fn for_rows<T: Send>(values: &mut [T], width: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let threads = rayon::current_num_threads();
    if threads == 1 || rayon::current_thread_index().is_none() || values.len() < PARALLEL_FROM {
        values.chunks_exact_mut(width).enumerate().for_each(|(row, values)| work(row, values));
    } else {
        let rows = (values.len() / width).div_ceil(4 * threads).max(1);
        values.par_chunks_mut(rows * width).enumerate().for_each(|(chunk, values)| {
            for (row, values) in (chunk * rows..).zip(values.chunks_exact_mut(width)) {
                work(row, values);
            }
        });
    }
}

/// Root mean square norm of every row of `[rows, weight.len()]`.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    for_rows(y, weight.len(), |row, y| {
        isa.run(RmsNorm { x: &x[row * weight.len()..][..weight.len()], weight, eps, y });
    });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { x, weight, eps, y } = self;
        let (vectors, rest) = x.as_chunks::<LANES>();
        let mut sums = [0.0; LANES];
        for vector in vectors {
            for lane in 0..LANES {
                sums[lane] = A::mul_add(vector[lane], vector[lane], sums[lane]);
            }
        }
        let squares = rest.iter().fold(add_lanes(sums), |sum, &x| A::mul_add(x, x, sum));
        let scale = 1.0 / (squares / weight.len() as f32 + eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * weight;
        }
    }
}

/// The sum over the lanes of a vector, always in this order.
#[inline(always)]
pub(crate) fn add_lanes(v: [f32; LANES]) -> f32 {
    let v: [f32; 8] = std::array::from_fn(|lane| v[lane] + v[lane + 8]);
    let v = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
    (v[0] + v[2]) + (v[1] + v[3])
}

/// Turns each head of a row: lanes `i` and `i + half` by the angle whose cosine and sine are at `i`.
pub(crate) struct Rotate<'a> {
    pub(crate) heads: &'a mut [f32],
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { heads, cos, sin } = self;
        let half = cos.len();
        for head in heads.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }
}

/// `silu(gate) * up`.
pub(crate) struct SiluGate<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) y: &'a mut [f32],
}

impl Kernel for SiluGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for ((y, gate), up) in self.y.iter_mut().zip(self.gate).zip(self.up) {
            *y = gate / (1.0 + exp::<A>(-gate)) * up;
        }
    }
}

#[inline(always)]
pub(crate) fn exp<A: Arithmetic>(x: f32) -> f32 {
    crate::exp::exp(x, A::mul_add)
}

/// The largest magnitude; NaN counts as none.
pub(crate) struct Largest<'a>(pub(crate) &'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        let (vectors, rest) = self.0.as_chunks::<LANES>();
        let mut largest = [0.0_f32; LANES];
        for vector in vectors {
            for lane in 0..LANES {
                let x = vector[lane].abs();
                largest[lane] = if x > largest[lane] { x } else { largest[lane] };
            }
        }
        largest.iter().chain(rest).fold(0.0, |largest, x| x.abs().max(largest))
    }
}

/// Rounds to bits of bf16, to nearest even.
pub(crate) struct RoundToBf16<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) y: &'a mut [u16],
}

impl Kernel for RoundToBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = to_bf16(*x);
        }
    }
}

#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits + (0x7fff + (bits >> 16 & 1));
    // A NaN stays one.
    let kept = if x.is_nan() { bits | 0x40_0000 } else { rounded };
    (kept >> 16) as u16
}

/// Rounds to the nearest number of e4m3, ties to even, saturating.
pub(crate) struct RoundToE4m3<'a, T> {
    pub(crate) x: &'a [f32],
    /// What each is divided by before.
    pub(crate) scale: f32,
    pub(crate) y: &'a mut [T],
}

/// What holds every number of e4m3.
pub(crate) trait HoldsE4m3 {
    fn of(value: f32) -> Self;
}

impl HoldsE4m3 for f32 {
    #[inline(always)]
    fn of(value: f32) -> f32 {
        value
    }
}

/// Bits of bf16.
impl HoldsE4m3 for u16 {
    #[inline(always)]
    fn of(value: f32) -> u16 {
        (value.to_bits() >> 16) as u16
    }
}

impl<T: HoldsE4m3> Kernel for RoundToE4m3<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = T::of(round_to_e4m3(x / self.scale));
        }
    }
}

/// The value of the code that [`e4m3::encode`] gives, without a branch.
#[inline(always)]
fn round_to_e4m3(value: f32) -> f32 {
    const SMALLEST_NORMAL: f32 = 0.015_625;
    const MANTISSA_BITS_APART: u32 = 23 - 3;
    let magnitude = value.abs();
    let magnitude = if magnitude > e4m3::MAX { e4m3::MAX } else { magnitude };
    // A power of two whose unit in the last place is the step between codes there: adding it rounds.
    let normal = if magnitude > SMALLEST_NORMAL { magnitude } else { SMALLEST_NORMAL };
    let step = f32::from_bits((normal.to_bits() & 0x7f80_0000) + (MANTISSA_BITS_APART << 23));
    (magnitude + step - step).copysign(value)
}

/// Widens bf16's rounding of numbers again.
pub(crate) fn rounded_to_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

pub(crate) fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_e4m3_is_that_of_its_codes() {
        let cases = (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16));
        let between = (0..1 << 20).map(|bits| f32::from_bits(0x3800_0000 + (bits << 7)));
        for x in cases.chain(between).flat_map(|x| [x, -x]) {
            let (own, code) = (round_to_e4m3(x), e4m3::decode(e4m3::encode(x)));
            assert!(own.to_bits() == code.to_bits() || own.is_nan() && code.is_nan(), "{x}: {own} {code}");
        }
    }

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        for bits in (0..u32::MAX).step_by(4093) {
            let x = f32::from_bits(bits);
            assert_eq!(to_bf16(x), bf16::from_f32(x).to_bits(), "{x}");
        }
    }
}
