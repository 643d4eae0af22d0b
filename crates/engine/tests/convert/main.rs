//! Conversion of checkpoints: GGUF import and quantization, against checkpoints that were not made by this code.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first surprise")]

mod gguf_writer;
mod import;
mod quantize;
mod smollm2;
mod tiny;
