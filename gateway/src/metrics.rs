//! What the gateway counts. Label values come from enums and from the fleet, never from clients.

use std::collections::BTreeSet;
use std::sync::Arc;

use herd_metrics::{ByModel, Family, MAX_MODELS, Page, PageBuilder, PageError, gateway as declared};
use herd_routing::Refusal;
use prometheus::{Histogram, IntCounter, IntGauge};

use crate::RequestError;
use crate::fleet::Fleet;

/// The metrics of one gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    page: Page,
    requests: Family<IntCounter>,
    refusals: Family<IntCounter>,
    pub(crate) in_flight: IntGauge,
    waiting: ByModel<IntGauge>,
    time_to_first_token: ByModel<Histogram>,
    inter_token_latency: ByModel<Histogram>,
    duration: ByModel<Histogram>,
    prompt_tokens: ByModel<IntCounter>,
    output_tokens: ByModel<IntCounter>,
    retries: Family<IntCounter>,
    pub(crate) resumes: IntCounter,
    gangs: Family<IntGauge>,
}

/// Those of one model, looked up once a request.
#[derive(Clone, Debug)]
pub(crate) struct ModelMetrics {
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) duration: Histogram,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) output_tokens: IntCounter,
}

/// Want of capacity, wherever it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    GatewayFull,
    ShuttingDown,
    Route(Refusal),
}

impl Want {
    const fn label(self) -> &'static str {
        match self {
            Self::GatewayFull => "gateway_full",
            Self::ShuttingDown => "shutting_down",
            Self::Route(Refusal::Full) => "gangs_full",
            Self::Route(Refusal::NoGang) => "no_gang",
            Self::Route(Refusal::Draining) => "draining",
            Self::Route(Refusal::NoPrefill) => "no_prefill",
            Self::Route(Refusal::NoDecode) => "no_decode",
        }
    }
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, PageError> {
        let mut page = PageBuilder::new(declared::METRICS)?;
        Ok(Self {
            requests: page.counters(&declared::REQUESTS)?,
            refusals: page.counters(&declared::REFUSALS)?,
            in_flight: page.gauge(&declared::IN_FLIGHT)?,
            waiting: page.gauges_by_model(&declared::WAITING_FOR_GANG)?,
            time_to_first_token: page.histograms_by_model(&declared::TIME_TO_FIRST_TOKEN_SECONDS)?,
            inter_token_latency: page.histograms_by_model(&declared::INTER_TOKEN_LATENCY_SECONDS)?,
            duration: page.histograms_by_model(&declared::DURATION_SECONDS)?,
            prompt_tokens: page.counters_by_model(&declared::PROMPT_TOKENS)?,
            output_tokens: page.counters_by_model(&declared::OUTPUT_TOKENS)?,
            retries: page.counters(&declared::RETRIES)?,
            resumes: page.counter(&declared::RESUMES)?,
            gangs: page.gauges(&declared::GANGS)?,
            page: page.finish()?,
        })
    }

    /// `outcome`: `ok`, `cancelled` or an error's category.
    pub(crate) fn ended(&self, api: &'static str, outcome: &'static str) {
        if let Some(requests) = self.requests.of(&[api, outcome]) {
            requests.inc();
        }
    }

    pub(crate) fn refused(&self, want: Want) {
        if let Some(refusals) = self.refusals.of(&[want.label()]) {
            refusals.inc();
        }
    }

    pub(crate) fn retried(&self, error: &RequestError) {
        if let Some(retries) = self.retries.of(&[error.category()]) {
            retries.inc();
        }
    }

    /// Those of a model that the fleet serves.
    pub(crate) fn model(&self, name: &str) -> Result<Arc<ModelMetrics>, prometheus::Error> {
        Ok(Arc::new(ModelMetrics {
            time_to_first_token: self.time_to_first_token.of(name)?,
            inter_token_latency: self.inter_token_latency.of(name)?,
            duration: self.duration.of(name)?,
            prompt_tokens: self.prompt_tokens.of(name)?,
            output_tokens: self.output_tokens.of(name)?,
        }))
    }

    /// Those of every model that has some.
    pub(crate) fn models(&self) -> Vec<(String, Arc<ModelMetrics>)> {
        let names = self.duration.each().into_iter().map(|(name, _)| name);
        names.filter_map(|name| Some((name.clone(), self.model(&name).ok()?))).collect()
    }

    /// The text format.
    pub(crate) fn render(&self, fleet: &Fleet) -> Result<String, prometheus::Error> {
        let served = fleet.names();
        self.keep(&served);
        for name in served.iter().take(MAX_MODELS) {
            self.model(name)?;
            self.waiting.of(name)?;
        }
        let waiting = fleet.waiting();
        for name in waiting.keys() {
            self.waiting.of(name)?;
        }
        for (name, gauge) in self.waiting.each() {
            gauge.set(i64::from(waiting.get(&name).copied().unwrap_or(0)));
        }
        let census = fleet.census();
        for (labels, gauge) in self.gangs.each() {
            let [role, phase] = labels[..] else { continue };
            gauge.set(census.get(&(role, phase)).copied().unwrap_or(0));
        }
        self.page.text("")
    }

    fn keep(&self, served: &BTreeSet<String>) {
        let Self {
            page: _,
            requests: _,
            refusals: _,
            in_flight: _,
            waiting,
            time_to_first_token,
            inter_token_latency,
            duration,
            prompt_tokens,
            output_tokens,
            retries: _,
            resumes: _,
            gangs: _,
        } = self;
        waiting.keep(served);
        time_to_first_token.keep(served);
        inter_token_latency.keep(served);
        duration.keep(served);
        prompt_tokens.keep(served);
        output_tokens.keep(served);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_label_there_is_is_declared() {
        let metrics = Metrics::new().unwrap();
        let text = String::new;
        let errors = [
            RequestError::invalid("", ""),
            RequestError::UnknownModel { model: text(), served: text() },
            RequestError::TooLarge { limit: 1 },
            RequestError::BodyTimeout(Duration::ZERO),
            RequestError::Busy { message: text(), retry_after: Duration::ZERO },
            RequestError::Unavailable(text()),
            RequestError::Deadline,
            RequestError::SlowClient,
            RequestError::Failed(text()),
        ];
        for api in ["generate", "chat", "completions"] {
            for outcome in errors.iter().map(RequestError::category).chain(["ok", "cancelled"]) {
                assert!(metrics.requests.of(&[api, outcome]).is_some(), "{api} {outcome}");
            }
        }
        assert!(errors.iter().all(|error| metrics.retries.of(&[error.category()]).is_some()));
        let routes =
            [Refusal::Full, Refusal::NoGang, Refusal::Draining, Refusal::NoPrefill, Refusal::NoDecode];
        for want in routes.into_iter().map(Want::Route).chain([Want::GatewayFull, Want::ShuttingDown]) {
            assert!(metrics.refusals.of(&[want.label()]).is_some(), "{want:?}");
        }
    }
}
