//! What a gateway counts.

use crate::buckets::{REQUEST_SECONDS, TOKEN_SECONDS};
use crate::declaration::{MODEL, Metric, label};

/// Categories of errors that end or refuse a request.
macro_rules! categories {
    ($($more:literal),*) => {
        &[
            $($more,)*
            "invalid", "unknown_model", "too_large", "body_timeout", "busy", "unavailable", "deadline", "slow_client",
            "failed",
        ]
    };
}

/// Requests that ended.
pub const REQUESTS: Metric = Metric::counter(
    "herd_gateway_requests_total",
    "requests",
    "Requests that ended, by front door and outcome: well, given up by the client, or an error's category.",
)
.by(&[label("api", &["generate", "chat", "completions"]), label("outcome", categories!("ok", "cancelled"))]);
/// Requests refused.
pub const REFUSALS: Metric = Metric::counter(
    "herd_gateway_refusals_total",
    "requests",
    "Requests refused for want of capacity: the gateway's own bound, all gangs full, no gang at all, all draining, or none \
     with one of the two roles; or because the gateway itself shuts down.",
)
.by(&[label(
    "reason",
    &["gateway_full", "gangs_full", "no_gang", "draining", "no_prefill", "no_decode", "shutting_down"],
)]);
/// Requests in work.
pub const IN_FLIGHT: Metric =
    Metric::gauge("herd_gateway_requests_in_flight", "requests", "Requests in work.");
/// Requests that wait.
pub const WAITING_FOR_GANG: Metric = Metric::gauge(
    "herd_gateway_requests_waiting_for_gang",
    "requests",
    "Requests, or choices of one, whose model has no gang that is ready.",
)
.by(&[MODEL]);
/// Time to first token.
pub const TIME_TO_FIRST_TOKEN_SECONDS: Metric = Metric::histogram(
    "herd_gateway_time_to_first_token_seconds",
    "seconds",
    REQUEST_SECONDS,
    "From the arrival of a request to its first token.",
)
.by(&[MODEL]);
/// Time between tokens.
pub const INTER_TOKEN_LATENCY_SECONDS: Metric = Metric::histogram(
    "herd_gateway_inter_token_latency_seconds",
    "seconds",
    TOKEN_SECONDS,
    "Between two tokens of a choice, as they come from the gang, waits for another gang included; of tokens that come in one \
     message, their part of it.",
)
.by(&[MODEL]);
/// Time of an answer.
pub const DURATION_SECONDS: Metric = Metric::histogram(
    "herd_gateway_request_duration_seconds",
    "seconds",
    REQUEST_SECONDS,
    "From the arrival of a request to the end of its answer, for those that ended well.",
)
.by(&[MODEL]);
/// Attempts that came to nothing.
pub const RETRIES: Metric = Metric::counter(
    "herd_gateway_retries_total",
    "attempts",
    "Attempts that a gang refused or failed, by category of the error.",
)
.by(&[label("reason", categories!())]);
/// Streams taken up by another gang.
pub const RESUMES: Metric = Metric::counter(
    "herd_gateway_resumes_total",
    "choices",
    "Times a choice that had begun went on after the gang at it was lost.",
);
/// Prompt tokens.
pub const PROMPT_TOKENS: Metric =
    Metric::counter("herd_gateway_prompt_tokens_total", "tokens", "Tokens of prompts sent to gangs.")
        .by(&[MODEL]);
/// Output tokens.
pub const OUTPUT_TOKENS: Metric =
    Metric::counter("herd_gateway_output_tokens_total", "tokens", "Tokens of finished choices.").by(&[MODEL]);
/// Gangs.
pub const GANGS: Metric = Metric::gauge("herd_gateway_gangs", "gangs", "Gangs found.").by(&[
    label("role", &["unified", "prefill", "decode", "unknown"]),
    label("phase", &["ready", "draining", "away"]),
]);

/// All of them, but for those that every process has.
pub const METRICS: &[&Metric] = &[
    &REQUESTS,
    &REFUSALS,
    &IN_FLIGHT,
    &WAITING_FOR_GANG,
    &TIME_TO_FIRST_TOKEN_SECONDS,
    &INTER_TOKEN_LATENCY_SECONDS,
    &DURATION_SECONDS,
    &PROMPT_TOKENS,
    &OUTPUT_TOKENS,
    &RETRIES,
    &RESUMES,
    &GANGS,
];
