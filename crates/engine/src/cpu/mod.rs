//! The CPU backend: the default one, and the numerical reference of all others.
#![expect(
    clippy::inline_always,
    reason = "kernels have to become part of the function that is compiled for the instruction set"
)]

mod attention;
mod batch;
mod e4m3;
mod elementwise;
mod isa;
mod linear;
mod load;
mod measure;
mod memory;
mod model;
mod packed;
mod pages;
mod peak;
mod product;
mod rank;
mod stored;

#[cfg(test)]
mod tests;

pub use isa::{Isa, UnknownIsa};
pub(crate) use measure::{Measure, MeasureError, SeenLayer, SeenLinear, measure};
pub use model::{Columns, CpuModel, CpuRanks, LoadError, LoadOptions, ModelInfo, RunningRanks};
pub use peak::peak_multiply_adds;
