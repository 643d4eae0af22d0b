//! What happens to a row between two linears: norm, rotation, gate. Each row by itself.

use super::isa::{Arithmetic, Isa, Kernel, LANES};

/// Root mean square norm of every row of `[rows, weight.len()]`.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
        let mean = isa.run(SumOfSquares(x)) / weight.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * weight;
        }
    }
    y
}

struct SumOfSquares<'a>(&'a [f32]);

impl Kernel for SumOfSquares<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        let (vectors, rest) = self.0.as_chunks::<LANES>();
        let mut sums = [0.0; LANES];
        for vector in vectors {
            for lane in 0..LANES {
                sums[lane] = A::mul_add(vector[lane], vector[lane], sums[lane]);
            }
        }
        rest.iter().fold(add_lanes(sums), |sum, &x| A::mul_add(x, x, sum))
    }
}

/// The sum over the lanes of a vector, always in this order.
#[inline(always)]
pub(crate) fn add_lanes(v: [f32; LANES]) -> f32 {
    let v = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
    (v[0] + v[2]) + (v[1] + v[3])
}

/// Turns each head of a row: lanes `i` and `i + half` by the angle whose cosine and sine are at `i`.
pub(crate) fn rotate(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

/// `silu(gate) * up` of rows `[gate, up]`, each `width` wide.
pub(crate) fn silu_gate(isa: Isa, gate_up: &[f32], width: usize) -> Vec<f32> {
    let mut y = vec![0.0; gate_up.len() / 2];
    for (row, y) in gate_up.chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        isa.run(SiluGate { gate, up, y });
    }
    y
}

struct SiluGate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
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

/// `e^x` within 2 units in the last place; below -87 it is 1e-38, above 88 it is 2e38. Source: the reduction and polynomial
/// of `expf` in Cephes (Moshier, 1989). Its own, so that it is vectorized and does not change with the C library.
#[inline(always)]
pub(crate) fn exp<A: Arithmetic>(x: f32) -> f32 {
    // Adding it rounds to a whole number, to nearest even, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = A::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let x = A::mul_add(power, -LN2_LOW, A::mul_add(power, -LN2_HIGH, x));
    let mut sum = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        sum = A::mul_add(sum, x, coefficient);
    }
    let fraction = A::mul_add(sum, x * x, x) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    fraction * f32::from_bits(exponent << 23)
}

pub(crate) fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}
