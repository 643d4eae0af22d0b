//! What the gateway counts. Label values come from enums, never from clients.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::fleet::Fleet;

/// The metrics of one gateway.
pub(crate) struct Metrics {
    registry: Registry,
    /// By front door and outcome: `ok`, `cancelled` or an error's category.
    pub(crate) requests: IntCounterVec,
    pub(crate) in_flight: IntGauge,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) duration: Histogram,
    pub(crate) retries: IntCounterVec,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) output_tokens: IntCounter,
    waiting: IntGauge,
    gangs: IntGaugeVec,
}

/// Seconds, from a cached reply of a small model to a long one of a large model.
const BUCKETS: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0];

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let histogram =
            |name, help| Histogram::with_opts(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()));
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("herd_gateway_requests_total", "Requests that ended, by front door and outcome."),
                &["api", "outcome"],
            )?,
            in_flight: IntGauge::new("herd_gateway_requests_in_flight", "Requests in work.")?,
            time_to_first_token: histogram(
                "herd_gateway_time_to_first_token_seconds",
                "From the arrival of a request to its first token.",
            )?,
            duration: histogram(
                "herd_gateway_request_duration_seconds",
                "From the arrival of a request to the end of its answer.",
            )?,
            retries: IntCounterVec::new(
                Opts::new("herd_gateway_retries_total", "Attempts that a gang refused or failed, by reason."),
                &["reason"],
            )?,
            prompt_tokens: IntCounter::new(
                "herd_gateway_prompt_tokens_total",
                "Tokens of prompts sent to gangs.",
            )?,
            output_tokens: IntCounter::new(
                "herd_gateway_output_tokens_total",
                "Tokens of finished choices.",
            )?,
            waiting: IntGauge::new(
                "herd_gateway_requests_waiting_for_gang",
                "Requests, or choices of one, whose model has no gang that is ready.",
            )?,
            gangs: IntGaugeVec::new(Opts::new("herd_gateway_gangs", "Gangs found."), &["role", "phase"])?,
            registry,
        };
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(metrics.in_flight.clone()))?;
        metrics.registry.register(Box::new(metrics.time_to_first_token.clone()))?;
        metrics.registry.register(Box::new(metrics.duration.clone()))?;
        metrics.registry.register(Box::new(metrics.retries.clone()))?;
        metrics.registry.register(Box::new(metrics.prompt_tokens.clone()))?;
        metrics.registry.register(Box::new(metrics.output_tokens.clone()))?;
        metrics.registry.register(Box::new(metrics.waiting.clone()))?;
        metrics.registry.register(Box::new(metrics.gangs.clone()))?;
        Ok(metrics)
    }

    /// The text format.
    pub(crate) fn render(&self, fleet: &Fleet) -> Result<Vec<u8>, prometheus::Error> {
        self.waiting.set(i64::from(fleet.waiting()));
        self.gangs.reset();
        for ((role, phase), count) in fleet.census() {
            self.gangs.with_label_values(&[role, phase]).set(count);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}
