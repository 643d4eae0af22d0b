//! AVX2 and FMA: a vector is two registers.

use std::arch::x86_64 as intel;

use super::{Arithmetic, Kernel, LANES, PAIR};
use crate::cpu::e4m3;

pub(super) fn is_here() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

/// # Safety
/// The CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Fused>()
}

/// Code that is entered through [`run`] alone.
#[derive(Clone, Copy)]
struct Fused;

type Half = intel::__m256;

/// Numbers whose bits are the upper half of each lane, from lanes of two numbers of 16 bits.
#[inline(always)]
fn split(pairs: intel::__m256i) -> [Half; 2] {
    // SAFETY: entered through `run`, so the CPU has AVX2.
    unsafe {
        let upper = intel::_mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        [
            intel::_mm256_castsi256_ps(intel::_mm256_slli_epi32::<16>(pairs)),
            intel::_mm256_castsi256_ps(intel::_mm256_and_si256(pairs, upper)),
        ]
    }
}

/// Of codes in the lowest or the second byte of each lane of two codes.
#[inline(always)]
fn decode<const LEFT: i32>(pairs: intel::__m256i) -> Half {
    // SAFETY: entered through `run`, so the CPU has AVX2.
    unsafe {
        // The code in the highest byte, sign first; then exponent and mantissa moved to f32's places below the sign.
        let code = intel::_mm256_slli_epi32::<LEFT>(pairs);
        let moved = intel::_mm256_srai_epi32::<4>(code);
        let kept = intel::_mm256_set1_epi32(0x87f0_0000_u32.cast_signed());
        let value = intel::_mm256_castsi256_ps(intel::_mm256_and_si256(moved, kept));
        intel::_mm256_mul_ps(value, intel::_mm256_set1_ps(e4m3::REBIAS))
    }
}

impl Arithmetic for Fused {
    type Vector = [Half; 2];

    const WIDE: bool = false;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn mul_add_lanes(a: [Half; 2], b: [Half; 2], c: [Half; 2]) -> [Half; 2] {
        // SAFETY: entered through `run`, so the CPU has FMA.
        unsafe { [intel::_mm256_fmadd_ps(a[0], b[0], c[0]), intel::_mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn splat(value: f32) -> [Half; 2] {
        // SAFETY: entered through `run`, so the CPU has AVX.
        [unsafe { intel::_mm256_set1_ps(value) }; 2]
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> [Half; 2] {
        // SAFETY: the CPU has AVX, as above; the array is 64 readable bytes, and any alignment will do.
        unsafe { [intel::_mm256_loadu_ps(values.as_ptr()), intel::_mm256_loadu_ps(values.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_bf16(pairs: &[u16; PAIR]) -> [[Half; 2]; 2] {
        // SAFETY: the CPU has AVX, as above; the array is 64 readable bytes, and any alignment will do.
        let [low, high] = unsafe {
            let from: *const intel::__m256i = pairs.as_ptr().cast();
            [split(intel::_mm256_loadu_si256(from)), split(intel::_mm256_loadu_si256(from.add(1)))]
        };
        [[low[0], high[0]], [low[1], high[1]]]
    }

    #[inline(always)]
    fn load_e4m3(pairs: &[u8; PAIR]) -> [[Half; 2]; 2] {
        // SAFETY: the CPU has AVX2, as above; the array is 32 readable bytes, and any alignment will do.
        let [low, high] = unsafe {
            let from: *const intel::__m128i = pairs.as_ptr().cast();
            [
                intel::_mm256_cvtepu16_epi32(intel::_mm_loadu_si128(from)),
                intel::_mm256_cvtepu16_epi32(intel::_mm_loadu_si128(from.add(1))),
            ]
        };
        [[decode::<24>(low), decode::<24>(high)], [decode::<16>(low), decode::<16>(high)]]
    }

    #[inline(always)]
    fn store(vector: [Half; 2], values: &mut [f32; LANES]) {
        // SAFETY: the CPU has AVX, as above; the array is 64 writable bytes, and any alignment will do.
        unsafe {
            intel::_mm256_storeu_ps(values.as_mut_ptr(), vector[0]);
            intel::_mm256_storeu_ps(values.as_mut_ptr().add(8), vector[1]);
        }
    }
}
