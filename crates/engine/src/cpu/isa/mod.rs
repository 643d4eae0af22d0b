//! Which instructions the kernels are compiled to. Kernels are written once, in plain Rust over small arrays; this module
//! compiles each of them for every level and picks at run time. Products of bf16 with AMX tiles are the one exception: those
//! are instructions of their own.
#![allow(
    unsafe_code,
    reason = "code compiled for an instruction set may only be entered where the CPU has it"
)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::product::Bf16Product;

/// Numbers of one vector.
pub(crate) const LANES: usize = 16;

/// Numbers of a pair of inputs of one vector of outputs.
pub(crate) const PAIR: usize = 2 * LANES;

/// An instruction set the CPU's kernels are compiled for, and that this CPU has. They differ in rounding, and so in bits: the
/// KV fingerprint names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

/// An instruction set that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given} is no instruction set of this cpu, which has {here}")]
pub struct UnknownIsa {
    /// Asked for.
    given: String,
    /// Those there are.
    here: String,
}

/// Made by `detect` and `all` alone, where the CPU has what it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL and BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// What `Avx512` has, and AMX tiles of bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// What a kernel may assume about the instructions it is compiled to.
pub(crate) trait Arithmetic: Copy {
    /// [`LANES`] numbers in registers.
    type Vector: Copy;
    /// A vector is one register of 32, not two of 16.
    const WIDE: bool;
    /// `a * b + c`, rounded as [`Arithmetic::mul_add_lanes`] rounds.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
    /// `a * b + c` of each lane.
    fn mul_add_lanes(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The same number in each lane.
    fn splat(value: f32) -> Self::Vector;
    /// From memory.
    fn load(values: &[f32; LANES]) -> Self::Vector;
    /// From bits of bf16, two numbers a lane: the first ones, and the second ones.
    fn load_bf16(pairs: &[u16; PAIR]) -> [Self::Vector; 2];
    /// From e4m3 codes, none of them NaN, two a lane: the first ones, and the second ones.
    fn load_e4m3(pairs: &[u8; PAIR]) -> [Self::Vector; 2];
    /// To memory.
    fn store(vector: Self::Vector, values: &mut [f32; LANES]);
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
    pub fn detect() -> Self {
        Self::all().last().copied().unwrap_or(Self::PORTABLE)
    }

    /// Those this CPU has, the best one last.
    pub fn all() -> Vec<Self> {
        let levels = [
            Some(Level::Portable),
            #[cfg(target_arch = "x86_64")]
            avx2::is_here().then_some(Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            avx512::is_here().then_some(Level::Avx512),
            #[cfg(target_arch = "x86_64")]
            (avx512::is_here() && amx::is_here()).then_some(Level::Amx),
        ];
        levels.into_iter().flatten().map(Self).collect()
    }

    const PORTABLE: Self = Self(Level::Portable);

    fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "amx",
        }
    }

    /// Part of the KV fingerprint.
    pub(crate) fn numerics(self) -> &'static str {
        match self.0 {
            Level::Portable => "cpu-portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "cpu-fma",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "cpu-avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "cpu-amx-bf16",
        }
    }

    /// Whether it multiplies bf16 by bf16 as they are. Else rows are widened to f32.
    pub fn has_bf16(self) -> bool {
        match self.0 {
            Level::Portable => false,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => false,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Amx => true,
        }
    }

    /// Panels that a product of so many rows takes at once.
    pub(crate) fn panels_at_once(self, rows: usize) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => amx::panels_at_once(rows),
            _ => 4,
        }
    }

    /// Runs a kernel with these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Portable => kernel.run::<portable::Unfused>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level was made where the CPU has AVX2 and FMA.
            Level::Avx2 => unsafe { avx2::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: these levels were made where the CPU has the AVX-512 that `avx512` names.
            Level::Avx512 | Level::Amx => unsafe { avx512::run(kernel) },
        }
    }

    /// A product of bf16 rows; for levels that have it. The others add nothing.
    pub(crate) fn multiply_bf16(self, product: Bf16Product<'_>) {
        match self.0 {
            Level::Portable => debug_assert!(false, "no bf16 products"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => debug_assert!(false, "no bf16 products"),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level was made where the CPU has the AVX-512 that `avx512` names.
            Level::Avx512 => unsafe { avx512::multiply(product) },
            #[cfg(target_arch = "x86_64")]
            Level::Amx => amx::multiply(product),
        }
    }

    /// Decodes e4m3 codes, none of them NaN, to bits of bf16; for levels that have bf16 products. Meanwhile asks for those that
    /// lie so many bytes after them.
    pub(crate) fn widen_e4m3(self, codes: &[u8], into: &mut [u16], ahead: usize) {
        #[cfg(target_arch = "x86_64")]
        if matches!(self.0, Level::Avx512 | Level::Amx) {
            // SAFETY: these levels were made where the CPU has the AVX-512 that `avx512` names.
            unsafe { avx512::widen_e4m3(codes, into, ahead) }
            return;
        }
        for (bits, code) in into.iter_mut().zip(codes) {
            *bits = (super::e4m3::decode_finite(*code).to_bits() >> 16) as u16;
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        let all = Self::all();
        all.iter().find(|isa| isa.name() == name).copied().ok_or_else(|| UnknownIsa {
            given: name.to_owned(),
            here: all.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in Isa::all() {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "neon2".parse::<Isa>().unwrap_err().to_string();
        assert!(error.starts_with("neon2 is no instruction set") && error.contains("portable"), "{error}");
    }
}
