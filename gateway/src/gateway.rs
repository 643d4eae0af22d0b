//! A running gateway: what the front doors share, and starting and ending it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, watch};
use tokio::time::{timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::admission::Admission;
use crate::fleet::{Fleet, Model, NotChosen};
use crate::generation::{self, Events};
use crate::metrics::{Metrics, Want};
use crate::observe::{Admitted, Api};
use crate::options::{Addresses, GatewayOptions};
use crate::page::Page;
use crate::ports::PortError;
use crate::request::GenerationRequest;
use crate::task::OwnedTask;
use crate::validate::validate;
use crate::{Discovery, Limits, RequestError, grpc, openai};

/// The front door, for as long as it is held.
pub struct Gateway {
    addresses: Addresses,
    closing: watch::Sender<bool>,
    doors: Vec<OwnedTask>,
    parts: Arc<Parts>,
    cut: CancellationToken,
    _fleet: Arc<Fleet>,
    /// Held for its task: dropped, it finds nothing new.
    _discovery: Arc<dyn Discovery>,
}

/// A gateway that does not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// An address that cannot be listened on.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The fleet is not whole in time.
    #[error("not every gang was ready within {within:?}: {reasons}")]
    NotReady {
        /// [`GatewayOptions::ready_within`].
        within: Duration,
        /// Each gang that is not, and what it was last seen to fail at.
        reasons: String,
    },
    /// A gang that no waiting makes ready: its model's text files cannot be used.
    #[error("{0}")]
    Unusable(String),
    /// The metrics are not what is declared.
    #[error("failed to register metrics: {0}")]
    Metrics(#[from] herd_metrics::PageError),
    /// The descriptors compiled in are broken.
    #[error("failed to build server reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// What the front doors share.
pub(crate) struct Parts {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) limits: Limits,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) page: Page,
    admission: Admission,
    /// Cancelled when requests have had their time to end.
    pub(crate) out_of_time: CancellationToken,
    /// Tokenizing is work for a core, not for the reactor: this many jobs run beside it.
    tokenizing: Arc<Semaphore>,
}

/// A generation that runs, and what is known of it before its first event.
pub(crate) struct Submitted {
    pub(crate) events: Events,
    pub(crate) model: Model,
    pub(crate) seed: u64,
    pub(crate) prompts: Vec<Vec<u32>>,
}

impl Gateway {
    /// Follows the fleet and opens both ports, see [`GatewayOptions::ready_within`].
    pub async fn start(options: GatewayOptions) -> Result<Self, GatewayError> {
        let GatewayOptions { discovery, http, grpc, ready_within, limits } = options;
        let fleet = Arc::new(Fleet::start(discovery.as_ref(), limits.queue_per_gang));
        if let Some(patience) = ready_within {
            match timeout(patience, fleet.ready()).await {
                Ok(ready) => ready.map_err(GatewayError::Unusable)?,
                Err(_) => {
                    return Err(GatewayError::NotReady { within: patience, reasons: fleet.reasons() });
                }
            }
        }
        let addresses = Addresses { http: http.address(), grpc: grpc.address() };
        let metrics = Arc::new(Metrics::new()?);
        let parts = Arc::new(Parts {
            fleet: Arc::clone(&fleet),
            page: Page::new(&fleet, &metrics, discovery.decisions()),
            metrics,
            admission: Admission::new(limits.concurrent_requests),
            out_of_time: CancellationToken::new(),
            tokenizing: Arc::new(Semaphore::new(limits.tokenizing)),
            limits,
        });
        let cut = CancellationToken::new();
        let closing = watch::Sender::new(false);
        let doors = vec![
            grpc::open(grpc.listen()?, Arc::clone(&parts), closing.subscribe(), cut.clone())?,
            openai::open(http.listen()?, Arc::clone(&parts), closing.subscribe(), cut.clone()),
        ];
        info!(http = %addresses.http, grpc = %addresses.grpc, "listening");
        Ok(Self { addresses, closing, doors, parts, cut, _fleet: fleet, _discovery: discovery })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Takes nothing new, lets requests end for as long as [`Limits::drain`] says, and ends those that are left with an
    /// error. Connections without a request are not waited for.
    pub async fn shutdown(self) {
        let Self { addresses: _, closing, doors, parts, cut, _fleet, _discovery } = self;
        closing.send_replace(true);
        if timeout(parts.limits.drain, parts.admission.drain()).await.is_err() {
            info!("ended requests that did not end in time");
            parts.out_of_time.cancel();
        }
        let mut ends = futures::future::join_all(doors.into_iter().map(OwnedTask::join));
        if timeout(LAST_WORDS, &mut ends).await.is_err() {
            cut.cancel();
            let _ = timeout(LAST_WORDS, ends).await;
        }
    }
}

/// For answers that are complete to reach their clients, and for connections to close.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Parts {
    /// A place for a request, or a refusal at once.
    pub(crate) fn admit(&self, api: Api) -> Result<Admitted, RequestError> {
        match self.admission.admit() {
            Ok(permit) => Ok(Admitted::new(&self.metrics, api, permit)),
            Err(error) => {
                let full = matches!(error, RequestError::Busy { .. });
                self.metrics.refused(if full { Want::GatewayFull } else { Want::ShuttingDown });
                Admitted::refused(&self.metrics, api, &error);
                Err(error)
            }
        }
    }

    /// Checks, tokenizes, and starts. `now` is for chat templates that state the date.
    pub(crate) async fn submit(
        self: &Arc<Self>,
        request: GenerationRequest,
        mut admitted: Admitted,
        now: SystemTime,
    ) -> Result<Submitted, RequestError> {
        let deadline = request.deadline;
        let prepared = tokio::select! {
            prepared = timeout_at(deadline, self.prepare(request, now)) => {
                prepared.unwrap_or(Err(RequestError::Deadline))
            }
            () = self.out_of_time.cancelled() => Err(RequestError::shutting_down()),
        };
        let generation = prepared.inspect_err(|error| admitted.ended(Some(error)))?;
        let model = generation.model.clone();
        let seed = generation.sampling.seed;
        let prompts = generation.prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
        let metrics =
            self.metrics.model(&model.name).map_err(|error| RequestError::Failed(error.to_string()));
        let metrics = metrics.inspect_err(|error| admitted.ended(Some(error)))?;
        admitted.is_for(Arc::clone(&metrics));
        Ok(Submitted { events: generation::start(self, generation, metrics, admitted), model, seed, prompts })
    }

    async fn prepare(
        &self,
        request: GenerationRequest,
        now: SystemTime,
    ) -> Result<crate::validate::ValidatedGeneration, RequestError> {
        if request.model.is_empty() {
            let field = request.names.model;
            return Err(RequestError::invalid(
                field,
                format!("{field} is empty: it must name a served model"),
            ));
        }
        let chosen = self.fleet.chosen(&request.model, self.limits.gang_wait).await;
        let model = chosen.map_err(|NotChosen { error, refusal }| {
            if let Some(refusal) = refusal {
                self.metrics.refused(Want::Route(refusal));
            }
            error
        })?;
        let gone = || RequestError::Failed("tokenizing was cut short".to_owned());
        let slot = Arc::clone(&self.tokenizing).acquire_owned().await.map_err(|_| gone())?;
        let limits = self.limits.clone();
        let seed = drawn_seed();
        let job = tokio::task::spawn_blocking(move || {
            let _slot = slot;
            validate(request, model, &limits, now, seed)
        });
        job.await.map_err(|_| gone())?
    }
}

fn drawn_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}
