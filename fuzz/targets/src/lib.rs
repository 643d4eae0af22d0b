//! Fuzz targets: readers of files and requests that come from outside, as functions over bytes, each with seeds. Whatever the bytes, they
//! return; they do not panic, and allocate no more than the bytes warrant. `tests/bounded.rs` runs a fixed number of mutated
//! seeds, the crate above this one runs them for as long as one likes.

mod grammar;
mod seeds;

use herd_engine::readers;
use herd_model::ModelConfig;

/// A reader to be fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Also of its fuzz target.
    pub name: &'static str,
    /// Reads the bytes; what comes of it does not matter.
    pub run: fn(&[u8]),
    /// Bytes to begin with, valid ones among them.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Makes up for what most changes break first, so that others are reached.
    pub repair: fn(&mut [u8]),
    /// Whether a seed is valid.
    pub reads: fn(&[u8]) -> bool,
    /// That may be allocated at once, whatever the bytes.
    pub fixed_bytes: usize,
    /// And on top for each of the bytes.
    pub bytes_per_byte: usize,
}

/// All of them.
pub const TARGETS: [Target; 4] = [
    Target {
        name: "safetensors",
        run: |bytes| drop(readers::safetensors(bytes)),
        seeds: seeds::safetensors,
        repair: header_length,
        reads: |bytes| readers::safetensors(bytes).is_ok(),
        fixed_bytes: 1 << 16,
        bytes_per_byte: 64,
    },
    Target {
        name: "gguf",
        run: |bytes| drop(readers::gguf(bytes)),
        seeds: seeds::gguf,
        repair: |_| (),
        reads: |bytes| readers::gguf(bytes).is_ok(),
        fixed_bytes: 1 << 18,
        bytes_per_byte: 64,
    },
    Target {
        name: "config",
        run: config,
        seeds: seeds::config,
        repair: |_| (),
        reads: |bytes| ModelConfig::from_json(bytes, None).is_ok(),
        // Patterns of modules are compiled.
        fixed_bytes: 16 << 20,
        bytes_per_byte: 64,
    },
    Target {
        name: "grammar",
        run: |bytes| _ = grammar::follow(bytes),
        seeds: seeds::grammar,
        repair: |_| (),
        reads: grammar::follow,
        // What its limits let a parser have.
        fixed_bytes: 8 << 20,
        bytes_per_byte: 1 << 12,
    },
];

/// The header of a safetensors file ends with its last brace.
fn header_length(bytes: &mut [u8]) {
    let end = bytes.iter().rposition(|byte| *byte == b'}');
    if let (Some(end), Some(length)) = (end, bytes.first_chunk_mut()) {
        *length = (end as u64).saturating_sub(7).to_le_bytes();
    }
}

/// As `config.json`, and as the `generation_config.json` beside a valid one.
fn config(bytes: &[u8]) {
    drop(ModelConfig::from_json(bytes, None));
    drop(ModelConfig::from_json(seeds::CONFIG, Some(bytes)));
}
