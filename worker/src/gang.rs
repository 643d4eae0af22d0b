//! What all calls share.

use std::sync::Arc;
use std::time::Duration;

use herd_engine::Engine;
use herd_proto::internal::v1::Role;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::backend::Model;
use crate::drain::Admission;
use crate::identity::Identity;
use crate::lease::Transfers;
use crate::metrics::Metrics;
use crate::net::Peers;
use crate::ranks::Followers;
use crate::refusal::not_whole;

/// One gang in one epoch, as its leader's service sees it.
#[derive(Debug)]
pub(crate) struct Gang {
    pub(crate) identity: Identity,
    pub(crate) model: Model,
    pub(crate) engine: Engine,
    pub(crate) admission: Arc<Admission>,
    pub(crate) role: Arc<watch::Sender<Role>>,
    pub(crate) transfers: Arc<Transfers>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) metrics: Arc<Metrics>,
    /// "host:port" of this leader, as other gangs reach it.
    pub(crate) endpoint: String,
    /// "host:port" of each rank's KV connections, as other gangs reach them.
    pub(crate) kv_endpoints: Vec<String>,
    pub(crate) lease: Duration,
    pub(crate) blocks_deadline: Duration,
    pub(crate) drain_deadline: Duration,
    /// Streams without an end of their own end with it.
    pub(crate) over: CancellationToken,
    /// The other processes of the gang, where it has any.
    pub(crate) followers: Option<Arc<Followers>>,
}

impl Gang {
    /// For the log: it takes requests.
    pub(crate) fn says_ready(&self) {
        let Self { identity, model, endpoint, followers, .. } = self;
        tracing::info!(
            gang = identity.gang_id,
            epoch = identity.epoch,
            endpoint,
            tensor = model.shards.tensor(),
            pipeline = model.shards.parallelism().pipeline,
            processes = 1 + followers.as_ref().map_or(0, |followers| followers.processes()),
            kv_blocks = model.kv_blocks,
            "ready"
        );
    }
}

/// The gang as it is now: none while its model is loaded, and between two epochs.
pub(crate) type Current = watch::Receiver<Option<Arc<Gang>>>;

/// The gang, or a refusal before anything was done.
pub(crate) fn current(gang: &Current) -> Result<Arc<Gang>, Status> {
    gang.borrow().clone().ok_or_else(not_whole)
}

/// What of a gang stays the same from one epoch to the next.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) gang_id: String,
    pub(crate) revision: String,
    pub(crate) role: Arc<watch::Sender<Role>>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) endpoint: String,
    pub(crate) lease: Duration,
    pub(crate) blocks_deadline: Duration,
    pub(crate) drain_deadline: Duration,
    pub(crate) shutdown: CancellationToken,
}

impl Host {
    /// The gang of a new epoch.
    pub(crate) fn gang(
        &self,
        epoch: u64,
        model: Model,
        engine: Engine,
        kv_endpoints: Vec<String>,
        followers: Option<Arc<Followers>>,
    ) -> Gang {
        let Self {
            gang_id,
            revision,
            role,
            peers,
            metrics,
            endpoint,
            lease,
            blocks_deadline,
            drain_deadline,
            shutdown,
        } = self.clone();
        let capacity = engine.limits().running_sequences() + engine.limits().max_waiting;
        metrics.kv(model.kv_blocks, model.block_tokens);
        metrics.limits(&engine);
        Gang {
            identity: Identity { gang_id, epoch, revision, model_digest: model.digest.clone() },
            model,
            engine,
            admission: Arc::new(Admission::new(capacity)),
            role,
            transfers: Arc::new(Transfers::new(followers.clone())),
            peers,
            metrics,
            endpoint,
            kv_endpoints,
            lease,
            blocks_deadline,
            drain_deadline,
            over: shutdown.child_token(),
            followers,
        }
    }
}
