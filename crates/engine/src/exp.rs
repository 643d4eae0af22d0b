//! `e^x`, the same on every machine: written out, so that it is vectorized and does not change with the C library.
#![expect(
    clippy::inline_always,
    reason = "it has to become part of loops that are compiled for an instruction set"
)]

/// Within 2 units in the last place; below -87 it is 1e-38, above 88 it is 2e38. `mul_add` is `a * b + c`, rounded once or
/// twice. Source: the reduction and polynomial of `expf` in Cephes (Moshier, 1989).
#[inline(always)]
pub(crate) fn exp(x: f32, mul_add: impl Fn(f32, f32, f32) -> f32) -> f32 {
    // Adding it rounds to a whole number, to nearest even, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let x = mul_add(power, -LN2_LOW, mul_add(power, -LN2_HIGH, x));
    let mut sum = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        sum = mul_add(sum, x, coefficient);
    }
    let fraction = mul_add(sum, x * x, x) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    fraction * f32::from_bits(exponent << 23)
}

/// Below -87, where [`exp`] does not go, it is 0.
#[inline(always)]
pub(crate) fn exp_or_zero(x: f32) -> f32 {
    let value = exp(x, |a, b, c| a * b + c);
    if x < -87.0 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_within_two_units_in_the_last_place() {
        for step in -87_000..=88_000 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            for own in [exp(x, f32::mul_add), exp_or_zero(x)] {
                let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
                assert!((f64::from(own) - exact).abs() <= 2.5 * ulp, "{x}: {own} is not {exact}");
            }
        }
        assert!(exp_or_zero(f32::NEG_INFINITY) == 0.0 && exp_or_zero(-100.0) == 0.0);
    }
}
