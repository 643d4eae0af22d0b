//! What all calls share.

use std::sync::Arc;
use std::time::Duration;

use herd_engine::Engine;
use herd_proto::internal::v1::Role;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backend::Model;
use crate::drain::Admission;
use crate::identity::Identity;
use crate::lease::Transfers;
use crate::metrics::Metrics;
use crate::net::Peers;

/// One gang, as its leader's service sees it.
#[derive(Debug)]
pub(crate) struct Gang {
    pub(crate) identity: Identity,
    pub(crate) model: Model,
    pub(crate) engine: Engine,
    pub(crate) admission: Arc<Admission>,
    pub(crate) role: watch::Sender<Role>,
    pub(crate) transfers: Arc<Transfers>,
    pub(crate) peers: Peers,
    pub(crate) metrics: Arc<Metrics>,
    /// "host:port" of this leader, as other gangs reach it.
    pub(crate) endpoint: String,
    /// "host:port" of each rank's KV connections, as other gangs reach them.
    pub(crate) kv_endpoints: Vec<String>,
    pub(crate) lease: Duration,
    pub(crate) blocks_deadline: Duration,
    pub(crate) drain_deadline: Duration,
    /// Streams without an end of their own end with it.
    pub(crate) shutdown: CancellationToken,
}
