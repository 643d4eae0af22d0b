//! Whole models against the reference (transformers and torch in float32), and against themselves.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, also in what its cases share"
)]

mod batching;
mod perplexity;
mod reference;
#[path = "../restored/mod.rs"]
mod restored;
mod runner;
mod scheduling;
mod smollm2;
mod tokens;
