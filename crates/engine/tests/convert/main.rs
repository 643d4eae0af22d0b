//! Conversion of checkpoints: GGUF import and quantization, against checkpoints that were not made by this code.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at the first surprise"
)]

mod calibration;
mod gguf_writer;
mod import;
mod quantize;
#[path = "../restored/mod.rs"]
mod restored;
mod smollm2;
mod tiny;
