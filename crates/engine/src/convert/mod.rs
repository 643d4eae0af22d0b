//! Checkpoint conversion: GGUF files and bf16 checkpoints become the safetensors directories that the engine loads.
//!
//! [`import_gguf`] turns a GGUF file into a bf16 checkpoint in Hugging Face layout, [`quantize()`] turns one in bf16, f16 or f32
//! into one in FP8, as Meta or as vLLM stores it. Both read and write in pieces of a few MiB, whatever the size of the
//! model, and their output appears as a whole or not at all. [`calibration`] says what of a model FP8 does not suit.

pub mod calibration;
mod error;
mod ggml_type;
mod gguf;
mod import;
mod llama;
mod output;
mod progress;
mod quantize;
mod rope_scaling;
mod safetensors_file;
mod tokenizer;

pub use error::ConvertError;
pub use import::import_gguf;
pub(crate) use import::read_gguf;
pub use output::{FileSum, SUMS_FILE};
pub use progress::{NoProgress, Progress};
pub(crate) use quantize::quantize_row;
pub use quantize::{Layout, Quantization, quantize};
