//! Herd's gRPC services as Rust types. The protos are the documentation: `proto/herd/v1/inference.proto` is what clients
//! see, `proto/herd/internal/v1/worker.proto` what gateway, operator and workers say to each other, and `rank.proto` beside it
//! what the processes of a gang do.

/// The public API, `herd.v1`.
#[allow(missing_docs, clippy::pedantic, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("herd.v1");
}

/// The internal API, `herd.internal.v1`.
pub mod internal {
    /// Version 1.
    #[allow(missing_docs, clippy::pedantic, reason = "generated")]
    pub mod v1 {
        tonic::include_proto!("herd.internal.v1");
    }
}

/// Both packages' file descriptors, for server reflection.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

/// The largest gRPC message either side sends or takes, bytes. A 128K-token prompt is 0.5 MB.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
