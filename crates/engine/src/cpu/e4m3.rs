//! FP8 in the e4m3fn format: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, largest 448.

/// The largest finite magnitude.
pub(crate) const MAX: f32 = 448.0;

/// Exponent and mantissa of a code, moved to f32's places, are 1 / `REBIAS` of the value, subnormals included.
pub(crate) const REBIAS: f32 = f32::from_bits((127 + 120) << 23);

/// The value of a code, exactly.
#[cfg(test)]
pub(crate) fn decode(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN.copysign(if code & 0x80 == 0 { 1.0 } else { -1.0 });
    }
    decode_finite(code)
}

/// [`decode`] for codes that are known not to be NaN.
#[inline(always)]
pub(crate) fn decode_finite(code: u8) -> f32 {
    let code = u32::from(code);
    f32::from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * REBIAS
}

/// The nearest code, ties to even, saturating at 448.
#[cfg(test)]
pub(crate) fn encode(value: f32) -> u8 {
    const SMALLEST_NORMAL: f32 = 0.015_625;
    const EXPONENTS_APART: u32 = 120 << 3;
    let bits = value.to_bits();
    let sign = (bits >> 24 & 0x80) as u8;
    let magnitude = f32::from_bits(bits & 0x7fff_ffff);
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = magnitude.min(MAX);
    if magnitude < SMALLEST_NORMAL {
        // In units of 2^-9, the step of subnormals. Eight of them are the code of the smallest normal.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - EXPONENTS_APART) as u8
}
