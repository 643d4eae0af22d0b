//! gRPC connections to the leaders of other gangs.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use herd_proto::MAX_MESSAGE_BYTES;
use herd_proto::internal::v1::rank_client::RankClient;
use herd_proto::internal::v1::worker_client::WorkerClient;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{CONNECT_DEADLINE, KEEPALIVE};

/// Connections kept for the next call. More gangs than this take turns.
const MAX_PEERS: usize = 256;

/// A client of the leader of this gang, at "host:port". Its name is looked up anew at each call: a leader that was replaced
/// has another address.
pub(crate) async fn leader(address: &str) -> Result<RankClient<Channel>, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_DEADLINE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE);
    let channel = endpoint.connect().await.map_err(|error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    })?;
    Ok(RankClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES))
}

/// One connection a peer, opened when it is first used and again when it broke.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    channels: Mutex<HashMap<String, Channel>>,
}

impl Peers {
    /// A client of the leader at "host:port"; `field` names where the address came from. Opens nothing yet.
    pub(crate) fn client(&self, field: &str, peer: &str) -> Result<WorkerClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = if let Some(channel) = channels.get(peer) {
            channel.clone()
        } else {
            let endpoint = Endpoint::from_shared(format!("http://{peer}")).map_err(|error| {
                Status::invalid_argument(format!("{field}: {peer:?} is not host:port: {error}"))
            })?;
            let channel = endpoint
                .connect_timeout(CONNECT_DEADLINE)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE)
                .connect_lazy();
            if channels.len() >= MAX_PEERS
                && let Some(other) = channels.keys().next().cloned()
            {
                channels.remove(&other);
            }
            channels.insert(peer.to_owned(), channel.clone());
            channel
        };
        Ok(WorkerClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }
}
