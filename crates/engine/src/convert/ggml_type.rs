//! The tensor types of GGUF that can be imported, and their values. Layouts: `ggml-common.h` and the GGUF specification.

use half::{bf16, f16};

/// A tensor type: how many elements share a block and how a block is stored, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GgmlType {
    F32,
    F16,
    Bf16,
    /// 32 elements: f16 scale d, 16 bytes of 4-bit q; value d * (q - 8). Byte i holds elements i (low) and i + 16.
    Q4_0,
    /// 32 elements: f16 scale d, f16 minimum m, 16 bytes of 4-bit q; value d * q + m. Byte i holds elements i (low) and i + 16.
    Q4_1,
    /// 32 elements: f16 scale d, 32 signed bytes q; value d * q.
    Q8_0,
}

pub(super) const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1 and Q8_0";

impl GgmlType {
    /// The type with this id in a GGUF file.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            2 => Some(Self::Q4_0),
            3 => Some(Self::Q4_1),
            8 => Some(Self::Q8_0),
            30 => Some(Self::Bf16),
            _ => None,
        }
    }

    pub(super) fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => 32,
        }
    }

    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
        }
    }

    /// Values of the blocks in `source`, rounded to the nearest bf16 (ties to even), little-endian into `target`.
    /// `source` is whole blocks, `target` 2 bytes per element. False when a value is not finite.
    pub(super) fn decode_to_bf16(self, source: &[u8], target: &mut [u8]) -> bool {
        let mut finite = true;
        let mut put = |target: &mut [u8], value: f32| {
            let value = bf16::from_f32(value);
            finite &= value.is_finite();
            target.copy_from_slice(&value.to_le_bytes());
        };
        let blocks = source.chunks_exact(self.block_bytes());
        for (block, target) in blocks.zip(target.chunks_exact_mut(2 * self.block_elements())) {
            match self {
                Self::F32 => put(target, f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                Self::F16 => put(target, f16::from_le_bytes([block[0], block[1]]).to_f32()),
                Self::Bf16 => put(target, bf16::from_le_bytes([block[0], block[1]]).to_f32()),
                Self::Q4_0 => {
                    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    let (low, high) = target.split_at_mut(32);
                    for (i, &byte) in block[2..].iter().enumerate() {
                        put(&mut low[2 * i..2 * i + 2], d * (f32::from(byte & 15) - 8.0));
                        put(&mut high[2 * i..2 * i + 2], d * (f32::from(byte >> 4) - 8.0));
                    }
                }
                Self::Q4_1 => {
                    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    let m = f16::from_le_bytes([block[2], block[3]]).to_f32();
                    let (low, high) = target.split_at_mut(32);
                    for (i, &byte) in block[4..].iter().enumerate() {
                        put(&mut low[2 * i..2 * i + 2], d * f32::from(byte & 15) + m);
                        put(&mut high[2 * i..2 * i + 2], d * f32::from(byte >> 4) + m);
                    }
                }
                Self::Q8_0 => {
                    let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    for (target, &q) in target.chunks_exact_mut(2).zip(&block[2..]) {
                        put(target, d * f32::from(q.cast_signed()));
                    }
                }
            }
        }
        finite
    }
}

/// The name of a type id, for messages.
pub(super) fn type_name(id: u32) -> String {
    let name = match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        30 => "BF16",
        _ => return format!("type {id}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(ty: GgmlType, source: &[u8]) -> Vec<f32> {
        let elements = source.len() / ty.block_bytes() * ty.block_elements();
        let mut target = vec![0; 2 * elements];
        assert!(ty.decode_to_bf16(source, &mut target));
        target.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    }

    #[test]
    fn q4_1_is_scale_times_nibble_plus_minimum() {
        let mut block = vec![];
        block.extend(f16::from_f32(0.5).to_le_bytes());
        block.extend(f16::from_f32(-3.0).to_le_bytes());
        block.extend((0..16).map(|i| i | ((15 - i) << 4)));
        let expected: Vec<f32> =
            (0..16).chain((0..16).rev()).map(|q| 0.5f32.mul_add(f32::from(q as u8), -3.0)).collect();
        assert_eq!(decode(GgmlType::Q4_1, &block), expected);
    }

    /// By hand from `block_q4_0` and `dequantize_row_q4_0` of ggml: d is 0x3800, 0.5 in f16; the low nibbles are the first 16
    /// elements, the high ones the others, and 8 is taken off each.
    #[test]
    fn q4_0_is_scale_times_nibble_less_eight() {
        let block = [
            0x00, 0x38, 0x80, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7, 0x08, 0x19, 0x2a, 0x3b, 0x4c, 0x5d,
            0x6e, 0x7f,
        ];
        let low = [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5];
        let high = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5];
        assert_eq!(decode(GgmlType::Q4_0, &block), [low, high].concat());
        // A negative scale, in the second of two blocks: -0.25 times 7 and times -8.
        let second = [&[0x00, 0xb4][..], &[0x0f; 16]].concat();
        let both = decode(GgmlType::Q4_0, &[&block[..], &second].concat());
        assert_eq!(both[32..], [[-1.75; 16], [2.0; 16]].concat());
    }

    #[test]
    fn q8_0_is_scale_times_signed_byte() {
        let mut block = f16::from_f32(0.25).to_le_bytes().to_vec();
        block.extend((0..32).map(|i| (i * 8 - 128) as u8));
        let expected: Vec<f32> = (0..32).map(|i| 0.25 * (i * 8 - 128) as f32).collect();
        assert_eq!(decode(GgmlType::Q8_0, &block), expected);
    }

    /// 1 + 2^-8 lies between two bf16 values, 1 + 3 * 2^-8 too: ties go to the even one, down and up.
    #[test]
    fn rounds_to_nearest_even() {
        let source: Vec<u8> =
            [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0f32].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(decode(GgmlType::F32, &source), [1.0, 1.0 + 4.0 / 256.0, -0.0]);
        assert_eq!(decode(GgmlType::Bf16, &[0x80, 0x3f]), [1.0]);
        assert_eq!(decode(GgmlType::F16, &f16::from_f32(1.5).to_le_bytes()), [1.5]);
    }

    #[test]
    fn reports_values_that_are_not_finite() {
        for value in [f32::NAN, f32::INFINITY, f32::MAX] {
            assert!(!GgmlType::F32.decode_to_bf16(&value.to_le_bytes(), &mut [0; 2]));
        }
    }
}
