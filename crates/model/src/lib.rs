//! What a Llama model is, before any byte of it is loaded: configuration, shard plan, KV transfer plan, digests and
//! fingerprints. Knows no file, thread or socket.

mod bytes;
mod config;
mod digest;
mod dtype;
mod files;
mod linear;
mod quantization;
mod rope;
mod shard;
mod source;
mod transfer;

pub use bytes::{
    Part, SizeError, StoredFormat, StoredTensor, expected_tensors, kv_bytes_of_rank, kv_tokens, weight_bytes,
};
pub use config::{ConfigError, ModelConfig};
pub use digest::{FileDigest, kv_fingerprint, model_digest};
pub use dtype::{Dtype, UnknownDtype};
pub use files::{
    CONFIG_FILE, FilesError, INDEX_FILE, LARGE_FILE_BYTES, SIDE_FILES, SINGLE_FILE, Stage, is_weights,
    needed_files,
};
pub use linear::Linear;
pub use quantization::{Fp8, InputScales, Kept, Pattern, WeightScales};
pub use rope::{Llama3Scaling, Rope};
pub use shard::{Parallelism, RankShard, ShardError, ShardPlan};
pub use source::{BucketModel, HubModel, ModelSource, SourceError, is_pin};
pub use transfer::{KvRoute, kv_routes};

/// Tokens a KV block holds, on every rank of every gang.
pub const BLOCK_TOKENS: usize = 64;
