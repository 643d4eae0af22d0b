//! One transfer over the loopback interface, without gangs around it: for benchmarks.

use std::net::SocketAddr;
use std::sync::Arc;

use herd_engine::KvStore;
use herd_model::Dtype;
use tokio::sync::watch;

use super::{Outgoing, Receiver, Route, Store, receive, send};
use crate::WorkerError;
use crate::lease::Transfers;
use crate::metrics::{MetricOptions, Metrics};
use crate::net::{bind, serve_kv};

/// The KV of one prompt, from one rank to one rank.
#[derive(Debug, Clone)]
pub struct Loopback {
    /// Tokens of a block of both stores.
    pub block_tokens: usize,
    /// Tokens of the prompt; they fill the first blocks of both stores.
    pub prompt_tokens: usize,
}

impl Loopback {
    /// Sends all of it, as a prefill rank does whose prompt is computed, and returns once it is acknowledged.
    pub async fn send(&self, source: &dyn KvStore, target: Arc<dyn KvStore>) -> Result<(), WorkerError> {
        let Self { block_tokens, prompt_tokens } = *self;
        let (epoch, layers, heads) = (1, source.layers(), source.heads());
        let fingerprint = "kv1:loopback".to_owned();
        let metrics = Arc::new(Metrics::new(MetricOptions::default())?);
        let transfers = Arc::new(Transfers::default());
        let blocks: Arc<[u32]> = (0..prompt_tokens.div_ceil(block_tokens) as u32).collect();
        let transfer = 1;
        let landing = transfers.adopt(transfer);
        landing.open(None, Arc::clone(&blocks), &[Arc::clone(&target)], prompt_tokens, block_tokens);
        let receiver = Receiver {
            rank: 0,
            local: 0,
            epoch,
            fingerprint: fingerprint.clone(),
            dtype: Dtype::Bf16,
            block_tokens,
            store: Store(target),
            transfers,
            metrics: Arc::clone(&metrics),
        };
        let (listener, address) = bind(SocketAddr::from(([127, 0, 0, 1], 0)), "KV").await?;
        let outgoing = Outgoing {
            transfer,
            epoch,
            fingerprint,
            dtype: Dtype::Bf16,
            block_tokens,
            prompt_tokens,
            blocks,
        };
        let route = Route { endpoint: address.to_string(), source_rank: 0, target_rank: 0, layers, heads };
        let (_computed, progress) = watch::channel(prompt_tokens);
        let server = tokio::spawn(serve_kv(listener, move |stream| receive(receiver.clone(), stream)));
        let sent = send(route, &outgoing, source, progress, &metrics).await;
        server.abort();
        sent.map_err(|error| WorkerError::Internal(error.to_string()))?;
        if landing.is_complete() {
            Ok(())
        } else {
            Err(WorkerError::Internal("not all of the kv has landed".to_owned()))
        }
    }
}
