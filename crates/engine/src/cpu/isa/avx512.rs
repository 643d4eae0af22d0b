//! AVX-512 with products of bf16.

use std::arch::x86_64 as intel;

use super::{Arithmetic, Kernel, LANES, PAIR};
use crate::cpu::e4m3;
use crate::cpu::product::{Bf16Product, Tiles};

pub(super) fn is_here() -> bool {
    std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512bf16")
}

/// # Safety
/// [`is_here`].
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Wide>()
}

/// # Safety
/// [`is_here`].
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply(product: Bf16Product<'_>) {
    let (count, panels) = (product.count, product.panels.count);
    Bf16Tiles(product).run(count, panels, Wide::WIDE);
}

/// Each sum is one chain over the pairs in order: of a pair the second product is added first, then the first one, each
/// rounded once; subnormal numbers are zero. Source: VDPBF16PS in Intel's manual.
struct Bf16Tiles<'a>(Bf16Product<'a>);

impl Tiles for Bf16Tiles<'_> {
    #[inline(always)]
    fn tile<const ROWS: usize, const PANELS: usize>(&mut self, row: usize, panel: usize) {
        let Bf16Product { rows, row_stride, count: _, panels, out, add } = &mut self.0;
        let x: [&[[u16; 2]]; ROWS] =
            std::array::from_fn(|at| &rows[(row + at) * *row_stride..].as_chunks().0[..panels.pairs]);
        let weights: [&[[u16; PAIR]]; PANELS] = std::array::from_fn(|at| panels.of(panel + at));
        let mut sums = [[Wide::splat(0.0); PANELS]; ROWS];
        if *add {
            for (at_row, sums) in sums.iter_mut().enumerate() {
                for (at_panel, sum) in sums.iter_mut().enumerate() {
                    *sum = Wide::load(out.lanes(row + at_row, panel + at_panel));
                }
            }
        }
        // Loops: what a closure does would not be compiled for the instruction set.
        let mut loaded = [bf16(&[0; PAIR]); PANELS];
        for pair in 0..panels.pairs {
            for at_panel in 0..PANELS {
                loaded[at_panel] = bf16(&weights[at_panel][pair * panels.pair_stride]);
            }
            for at_row in 0..ROWS {
                let [first, second] = x[at_row][pair];
                let both = (u32::from(second) << 16 | u32::from(first)).cast_signed();
                for at_panel in 0..PANELS {
                    // SAFETY: entered through `multiply`, so the CPU has AVX512-BF16; the types are 512 bits all.
                    sums[at_row][at_panel] = unsafe {
                        let x: intel::__m512bh = std::mem::transmute(intel::_mm512_set1_epi32(both));
                        intel::_mm512_dpbf16_ps(sums[at_row][at_panel], x, loaded[at_panel])
                    };
                }
            }
        }
        for (at_row, sums) in sums.iter().enumerate() {
            for (at_panel, sum) in sums.iter().enumerate() {
                Wide::store(*sum, out.lanes(row + at_row, panel + at_panel));
            }
        }
    }
}

#[inline(always)]
fn bf16(pairs: &[u16; PAIR]) -> intel::__m512bh {
    // SAFETY: the CPU has AVX-512, as above; the array is 64 readable bytes, and any alignment will do.
    unsafe { std::mem::transmute(intel::_mm512_loadu_si512(pairs.as_ptr().cast())) }
}

/// # Safety
/// [`is_here`].
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn widen_e4m3(codes: &[u8], into: &mut [u16], ahead: usize) {
    /// Added to a code's exponent, in bf16's place: 127 - 7.
    const REBIAS: i16 = 120 << 7;
    // Magnitudes of codes below 8, which have no leading one: multiples of 2^-9, in lanes 0 to 7 and again from 16 on.
    let subnormal: [u16; PAIR] = std::array::from_fn(|lane| {
        if lane % 16 < 8 { (e4m3::decode_finite((lane % 8) as u8).to_bits() >> 16) as u16 } else { 0 }
    });
    let (codes, rest) = codes.as_chunks::<PAIR>();
    let (into, last) = into.as_chunks_mut::<PAIR>();
    // SAFETY: the CPU has AVX-512; the arrays are 32 readable and 64 writable bytes, and any alignment will do.
    unsafe {
        let subnormal = intel::_mm512_loadu_si512(subnormal.as_ptr().cast());
        let kept = intel::_mm512_set1_epi16(0x87f0_u16.cast_signed());
        let sign = intel::_mm512_set1_epi16(0x8000_u16.cast_signed());
        for (codes, into) in codes.iter().zip(into) {
            // A hint, which may be about memory that is not there.
            intel::_mm_prefetch::<{ intel::_MM_HINT_T1 }>(codes.as_ptr().wrapping_add(ahead).cast());
            let code = intel::_mm512_cvtepi8_epi16(intel::_mm256_loadu_si256(codes.as_ptr().cast()));
            // The sign fills the bits above the code, of which the highest stays.
            let moved = intel::_mm512_and_si512(intel::_mm512_slli_epi16::<4>(code), kept);
            let normal = intel::_mm512_add_epi16(moved, intel::_mm512_set1_epi16(REBIAS));
            let small = intel::_mm512_testn_epi16_mask(code, intel::_mm512_set1_epi16(0x78));
            let magnitude = intel::_mm512_permutexvar_epi16(code, subnormal);
            let signed = intel::_mm512_or_si512(magnitude, intel::_mm512_and_si512(code, sign));
            let bits = intel::_mm512_mask_mov_epi16(normal, small, signed);
            intel::_mm512_storeu_si512(into.as_mut_ptr().cast(), bits);
        }
    }
    for (bits, code) in last.iter_mut().zip(rest) {
        *bits = (e4m3::decode_finite(*code).to_bits() >> 16) as u16;
    }
}

/// Code that is entered through the functions above alone.
#[derive(Clone, Copy)]
struct Wide;

type Full = intel::__m512;

/// Of codes in the lowest or the second byte of each lane of two codes.
#[inline(always)]
fn decode<const LEFT: u32>(pairs: intel::__m512i) -> Full {
    // SAFETY: entered through the functions above, so the CPU has AVX-512.
    unsafe {
        // The code in the highest byte, sign first; then exponent and mantissa moved to f32's places below the sign.
        let code = intel::_mm512_slli_epi32::<LEFT>(pairs);
        let moved = intel::_mm512_srai_epi32::<4>(code);
        let kept = intel::_mm512_set1_epi32(0x87f0_0000_u32.cast_signed());
        let value = intel::_mm512_castsi512_ps(intel::_mm512_and_si512(moved, kept));
        intel::_mm512_mul_ps(value, intel::_mm512_set1_ps(e4m3::REBIAS))
    }
}

impl Arithmetic for Wide {
    type Vector = Full;

    const WIDE: bool = true;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn mul_add_lanes(a: Full, b: Full, c: Full) -> Full {
        // SAFETY: entered through the functions above, so the CPU has AVX-512.
        unsafe { intel::_mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn splat(value: f32) -> Full {
        // SAFETY: entered through the functions above, so the CPU has AVX-512.
        unsafe { intel::_mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Full {
        // SAFETY: the CPU has AVX-512, as above; the array is 64 readable bytes, and any alignment will do.
        unsafe { intel::_mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn load_bf16(pairs: &[u16; PAIR]) -> [Full; 2] {
        // SAFETY: the CPU has AVX-512, as above; the array is 64 readable bytes, and any alignment will do.
        unsafe {
            let pairs = intel::_mm512_loadu_si512(pairs.as_ptr().cast());
            let upper = intel::_mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            [
                intel::_mm512_castsi512_ps(intel::_mm512_slli_epi32::<16>(pairs)),
                intel::_mm512_castsi512_ps(intel::_mm512_and_si512(pairs, upper)),
            ]
        }
    }

    #[inline(always)]
    fn load_e4m3(pairs: &[u8; PAIR]) -> [Full; 2] {
        // SAFETY: the CPU has AVX-512, as above; the array is 32 readable bytes, and any alignment will do.
        let pairs = unsafe { intel::_mm512_cvtepu16_epi32(intel::_mm256_loadu_si256(pairs.as_ptr().cast())) };
        [decode::<24>(pairs), decode::<16>(pairs)]
    }

    #[inline(always)]
    fn store(vector: Full, values: &mut [f32; LANES]) {
        // SAFETY: the CPU has AVX-512, as above; the array is 64 writable bytes, and any alignment will do.
        unsafe { intel::_mm512_storeu_ps(values.as_mut_ptr(), vector) }
    }
}
