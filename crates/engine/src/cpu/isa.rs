//! Which instructions the kernels are compiled to. Kernels are written once, in plain Rust over small arrays; this module
//! compiles each of them twice and picks at run time.
#![allow(unsafe_code, reason = "code compiled for AVX2 and FMA may only be entered where the CPU has them")]

use super::e4m3;

/// Lanes of one vector of f32.
pub(crate) const LANES: usize = 8;

/// An instruction set the kernels are compiled for. They differ in rounding: a product that is added is rounded once with
/// FMA and twice without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    // Made by `detect` alone, where the CPU has both.
    #[cfg(target_arch = "x86_64")]
    Avx2Fma,
}

/// What a kernel may assume about the instructions it is compiled to.
pub(crate) trait Arithmetic: Copy {
    /// [`LANES`] numbers in a register.
    type Vector: Copy;
    /// `a * b + c`, rounded as [`Arithmetic::mul_add_lanes`] rounds.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
    /// `a * b + c` of each lane.
    fn mul_add_lanes(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The same number in each lane.
    fn splat(value: f32) -> Self::Vector;
    /// From memory.
    fn load(values: &[f32; LANES]) -> Self::Vector;
    /// From bits of bf16.
    fn load_bf16(values: &[u16; LANES]) -> Self::Vector;
    /// From e4m3 codes, none of them NaN.
    fn load_e4m3(codes: [u8; LANES]) -> Self::Vector;
    /// To memory.
    fn store(vector: Self::Vector) -> [f32; LANES];
}

/// A stored number that becomes f32 in registers.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// One of them.
    fn decode(self) -> f32;
    /// [`LANES`] of them.
    fn load<A: Arithmetic>(stored: &[Self; LANES]) -> A::Vector;
}

impl Stored for f32 {
    #[inline(always)]
    fn decode(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<A: Arithmetic>(stored: &[f32; LANES]) -> A::Vector {
        A::load(stored)
    }
}

/// Bits of a bf16.
impl Stored for u16 {
    #[inline(always)]
    fn decode(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    fn load<A: Arithmetic>(stored: &[u16; LANES]) -> A::Vector {
        A::load_bf16(stored)
    }
}

/// An e4m3 code that is not NaN.
impl Stored for u8 {
    #[inline(always)]
    fn decode(self) -> f32 {
        e4m3::decode_finite(self)
    }

    #[inline(always)]
    fn load<A: Arithmetic>(stored: &[u8; LANES]) -> A::Vector {
        A::load_e4m3(*stored)
    }
}

/// Work that is compiled for each instruction set. `run` and what it calls on the hot path are `#[inline(always)]`, so that
/// they become part of the function that has the instructions.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Does the work.
    fn run<A: Arithmetic>(self) -> Self::Output;
}

impl Isa {
    /// The best one this CPU has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            return Self(Level::Avx2Fma);
        }
        Self::PORTABLE
    }

    /// What every CPU has.
    pub(crate) const PORTABLE: Self = Self(Level::Portable);

    /// Part of the KV fingerprint.
    pub(crate) fn numerics(self) -> &'static str {
        match self.0 {
            Level::Portable => "cpu-portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Fma => "cpu-fma",
        }
    }

    /// Runs a kernel with these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Portable => kernel.run::<Unfused>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `detect` made this level after it saw that the CPU has AVX2 and FMA.
            Level::Avx2Fma => unsafe { run_avx2_fma(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2_fma<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<avx2::Fused>()
}

#[derive(Clone, Copy)]
struct Unfused;

impl Arithmetic for Unfused {
    type Vector = [f32; LANES];

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
    fn load_bf16(values: &[u16; LANES]) -> [f32; LANES] {
        values.map(Stored::decode)
    }

    #[inline(always)]
    fn load_e4m3(codes: [u8; LANES]) -> [f32; LANES] {
        codes.map(Stored::decode)
    }

    #[inline(always)]
    fn store(vector: [f32; LANES]) -> [f32; LANES] {
        vector
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64 as intel;

    use super::{Arithmetic, LANES};

    /// Code for AVX2 and FMA. Private to `isa`, which enters it through `run_avx2_fma` alone.
    #[derive(Clone, Copy)]
    pub(super) struct Fused;

    impl Arithmetic for Fused {
        type Vector = intel::__m256;

        #[inline(always)]
        fn mul_add(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }

        #[inline(always)]
        fn mul_add_lanes(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
            // SAFETY: entered through `run_avx2_fma`, so the CPU has FMA.
            unsafe { intel::_mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn splat(value: f32) -> Self::Vector {
            // SAFETY: entered through `run_avx2_fma`, so the CPU has AVX.
            unsafe { intel::_mm256_set1_ps(value) }
        }

        #[inline(always)]
        fn load(values: &[f32; LANES]) -> Self::Vector {
            // SAFETY: the CPU has AVX, as above; the array is 32 readable bytes, and any alignment will do.
            unsafe { intel::_mm256_loadu_ps(values.as_ptr()) }
        }

        #[inline(always)]
        fn load_bf16(values: &[u16; LANES]) -> Self::Vector {
            // SAFETY: the CPU has AVX2, as above; the array is 16 readable bytes, and any alignment will do.
            unsafe {
                let bits = intel::_mm256_cvtepu16_epi32(intel::_mm_loadu_si128(values.as_ptr().cast()));
                intel::_mm256_castsi256_ps(intel::_mm256_slli_epi32::<16>(bits))
            }
        }

        #[inline(always)]
        fn load_e4m3(codes: [u8; LANES]) -> Self::Vector {
            // SAFETY: the CPU has AVX2, as above; the array is 8 readable bytes, and any alignment will do.
            unsafe {
                // The sign fills the bits above the code, of which the highest stays.
                let codes = intel::_mm256_cvtepi8_epi32(intel::_mm_loadl_epi64(codes.as_ptr().cast()));
                let kept = intel::_mm256_set1_epi32(0x87f0_0000_u32.cast_signed());
                let bits = intel::_mm256_and_si256(intel::_mm256_slli_epi32::<20>(codes), kept);
                intel::_mm256_mul_ps(
                    intel::_mm256_castsi256_ps(bits),
                    intel::_mm256_set1_ps(super::e4m3::REBIAS),
                )
            }
        }

        #[inline(always)]
        fn store(vector: Self::Vector) -> [f32; LANES] {
            let mut values = [0.0; LANES];
            // SAFETY: the CPU has AVX, as above; the array is 32 writable bytes, and any alignment will do.
            unsafe { intel::_mm256_storeu_ps(values.as_mut_ptr(), vector) };
            values
        }
    }
}
