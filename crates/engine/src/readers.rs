//! Readers of bytes that come from outside, as plain functions over them, to be fuzzed: whatever the bytes, the answer is one
//! or an error that says what is wrong with them. The engine itself reads files, by the same code.

use crate::checkpoint::Header;
use crate::convert::{ConvertError, read_gguf};

/// Tensors in the header of a safetensors file, or what is wrong with it.
pub fn safetensors(file: &[u8]) -> Result<usize, String> {
    Header::of_bytes(file).map(|header| header.tensors.len())
}

/// A GGUF file: header, hyperparameters, tokenizer, and a place for each tensor.
pub fn gguf(file: &[u8]) -> Result<(), ConvertError> {
    read_gguf(file)
}
