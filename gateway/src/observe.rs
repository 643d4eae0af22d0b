//! One request's part in the metrics, from its admission to its end, however it ends.

use std::sync::Arc;

use tokio::time::Instant;

use crate::RequestError;
use crate::admission::Permit;
use crate::metrics::{Metrics, ModelMetrics};

/// A front door's method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Generate,
    Chat,
    Completions,
}

impl Api {
    fn label(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Chat => "chat",
            Self::Completions => "completions",
        }
    }
}

/// An admitted request; counted as cancelled if dropped before its end is known.
pub(crate) struct Admitted {
    api: Api,
    begun: Instant,
    first_token: bool,
    outcome: &'static str,
    metrics: Arc<Metrics>,
    /// Once its model is known.
    model: Option<Arc<ModelMetrics>>,
    _permit: Permit,
}

impl Admitted {
    pub(crate) fn new(metrics: &Arc<Metrics>, api: Api, permit: Permit) -> Self {
        metrics.in_flight.inc();
        let metrics = Arc::clone(metrics);
        Self {
            api,
            begun: Instant::now(),
            first_token: false,
            outcome: "cancelled",
            metrics,
            model: None,
            _permit: permit,
        }
    }

    /// A request that was not admitted.
    pub(crate) fn refused(metrics: &Metrics, api: Api, error: &RequestError) {
        metrics.ended(api.label(), error.category());
    }

    /// It is for a model that the fleet serves.
    pub(crate) fn is_for(&mut self, model: Arc<ModelMetrics>) {
        self.model = Some(model);
    }

    pub(crate) fn token(&mut self) {
        if !std::mem::replace(&mut self.first_token, true)
            && let Some(model) = &self.model
        {
            model.time_to_first_token.observe(self.begun.elapsed().as_secs_f64());
        }
    }

    pub(crate) fn ended(&mut self, error: Option<&RequestError>) {
        self.outcome = error.map_or("ok", RequestError::category);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let Self { api, begun, first_token: _, outcome, metrics, model, _permit: _ } = self;
        metrics.in_flight.dec();
        metrics.ended(api.label(), outcome);
        if let Some(model) = model
            && *outcome == "ok"
        {
            model.duration.observe(begun.elapsed().as_secs_f64());
        }
    }
}
