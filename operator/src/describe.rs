//! Asks a gang what it has loaded.

use std::net::IpAddr;
use std::time::Duration;

use herd_api::{ModelStatus, ports};
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{DescribeRequest, DescribeResponse};
use tonic::transport::Endpoint;

/// For a gang that is Ready to answer.
const DEADLINE: Duration = Duration::from_secs(3);

/// What the leader at `address` says; `None` where it does not answer.
pub(crate) async fn describe(address: &str) -> Option<ModelStatus> {
    match ask(address).await {
        Ok(status) => Some(status),
        Err(error) => {
            tracing::warn!(address, "the gang did not describe itself: {error:#}");
            None
        }
    }
}

async fn ask(address: &str) -> anyhow::Result<ModelStatus> {
    let host = match address.parse()? {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let endpoint = Endpoint::from_shared(format!("http://{host}:{}", ports::GRPC))?;
    let channel = endpoint.connect_timeout(DEADLINE).timeout(DEADLINE).connect().await?;
    let answer = WorkerClient::new(channel).describe(DescribeRequest {}).await?.into_inner();
    let DescribeResponse { model_digest, context_length, block_tokens, kv_blocks, .. } = answer;
    Ok(ModelStatus {
        digest: model_digest,
        context_length: i32::try_from(context_length).unwrap_or(i32::MAX),
        kv_tokens_per_gang: i64::from(block_tokens) * i64::from(kv_blocks),
    })
}
