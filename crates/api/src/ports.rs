//! Ports of a worker's pod.

/// Internal gRPC of the leader.
pub const GRPC: i32 = 9000;
/// `/healthz`, `/readyz`, `/metrics`.
pub const HTTP: i32 = 9001;
/// KV transfer of the pod's first rank; rank N of the pod is N above.
pub const KV: i32 = 9100;
/// The ranks' own connections, where a gang has several pods.
pub const RANK: i32 = 9200;
/// Name of [`GRPC`] in Services and pods.
pub const GRPC_NAME: &str = "grpc";
/// Name of [`HTTP`] in pods.
pub const HTTP_NAME: &str = "http";
/// Name of [`RANK`] in pods.
pub const RANK_NAME: &str = "rank";
