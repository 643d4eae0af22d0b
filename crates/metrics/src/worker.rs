//! What a worker counts. The leader of a gang of several processes says all of it about the gang; the other processes say
//! what passes through themselves (KV frames and bytes, ranks, rows clipped) and 0 for the rest.

use crate::alias::{Alias, AliasOf};
use crate::buckets::{REQUEST_SECONDS, STEP_COUNTS, TOKEN_SECONDS};
use crate::declaration::{Metric, label};

/// Calls taken.
pub const REQUESTS: Metric = Metric::counter("herd_requests_total", "calls", "Calls taken.")
    .by(&[label("call", &["decode", "prefill"])]);
/// Calls refused.
pub const REQUESTS_REFUSED: Metric = Metric::counter(
    "herd_requests_refused_total",
    "calls",
    "Calls refused before anything was done: the gang drains, its queue is full, it is not whole, the call was meant for \
     another epoch, revision or model, the request is invalid, or its prefill gang did not take it.",
)
.by(&[
    label("call", &["decode", "prefill"]),
    label("reason", &["draining", "full", "not_whole", "stale", "invalid", "prefill", "other"]),
]);
/// Sequences that run.
pub const REQUESTS_RUNNING: Metric =
    Metric::gauge("herd_requests_running", "sequences", "Sequences that run, reservations included.");
/// Requests that wait.
pub const REQUESTS_WAITING: Metric =
    Metric::gauge("herd_requests_waiting", "requests", "Requests in the engine's queue.");
/// Tokens that wait.
pub const WAITING_PROMPT_TOKENS: Metric = Metric::gauge(
    "herd_waiting_prompt_tokens",
    "tokens",
    "Prompt tokens of the requests in the engine's queue.",
);
/// Sequences that may run.
pub const SEQUENCES_LIMIT: Metric =
    Metric::gauge("herd_sequences_limit", "sequences", "Sequences that may run at once.");
/// Requests that may wait.
pub const REQUESTS_WAITING_LIMIT: Metric =
    Metric::gauge("herd_requests_waiting_limit", "requests", "Requests that may wait in the engine's queue.");
/// KV blocks.
pub const KV_BLOCKS: Metric = Metric::gauge("herd_kv_blocks", "blocks", "KV blocks that each rank has.");
/// KV blocks that are owned.
pub const KV_BLOCKS_USED: Metric =
    Metric::gauge("herd_kv_blocks_used", "blocks", "KV blocks that are owned, reserved ones included.");
/// Their ratio.
pub const KV_USAGE: Metric =
    Metric::gauge("herd_kv_usage_ratio", "0 to 1", "Part of the KV blocks that is owned.");
/// Size of a block.
pub const KV_BLOCK_TOKENS: Metric =
    Metric::gauge("herd_kv_block_tokens", "tokens", "Tokens that a KV block holds.");
/// The epoch.
pub const GANG_EPOCH: Metric = Metric::gauge(
    "herd_gang_epoch",
    "epoch",
    "Epoch of the gang, 0 while it is not whole; it changes when the gang starts anew in place. An epoch has 64 bits, of \
     which Prometheus keeps the first 53; herd_gang_epoch_low has the last 32.",
);
/// The end of the epoch.
pub const GANG_EPOCH_LOW: Metric = Metric::gauge(
    "herd_gang_epoch_low",
    "epoch",
    "Last 32 bits of the epoch of the gang, exact: what Prometheus drops of herd_gang_epoch tells two starts apart.",
);
/// Steps.
pub const STEPS: Metric = Metric::counter("herd_steps_total", "steps", "Forward passes.");
/// Time of steps.
pub const STEP_SECONDS: Metric = Metric::histogram(
    "herd_step_seconds",
    "seconds",
    TOKEN_SECONDS,
    "Time of a forward pass on the leader, from its plan to the sampled tokens; the sum is the time the gang was busy.",
);
/// Tokens of steps.
pub const STEP_TOKENS: Metric =
    Metric::histogram("herd_step_tokens", "tokens", STEP_COUNTS, "Tokens that a forward pass computed.");
/// Sequences of steps.
pub const STEP_SEQUENCES: Metric = Metric::histogram(
    "herd_step_sequences",
    "sequences",
    STEP_COUNTS,
    "Sequences in the batch of a forward pass.",
);
/// Prompt tokens.
pub const PROMPT_TOKENS: Metric =
    Metric::counter("herd_prompt_tokens_total", "tokens", "Prompt tokens computed, each once.");
/// Output tokens.
pub const OUTPUT_TOKENS: Metric = Metric::counter("herd_output_tokens_total", "tokens", "Tokens sampled.");
/// Prompt tokens that should not have been computed.
pub const PREFILL_RECOMPUTED_TOKENS: Metric = Metric::counter(
    "herd_prefill_recomputed_tokens_total",
    "tokens",
    "Prompt tokens computed although their KV came from a prefill gang; anything but 0 is a mistake.",
);
/// Prompt tokens that were there.
pub const PREFIX_CACHED_TOKENS: Metric = Metric::counter(
    "herd_prefix_cached_tokens_total",
    "tokens",
    "Prompt tokens whose KV was in the prefix cache when their sequence started; with those computed, all there were.",
);
/// Sequences that lost their blocks.
pub const PREEMPTIONS: Metric = Metric::counter(
    "herd_preemptions_total",
    "preemptions",
    "Times a sequence gave its KV blocks to others, to go on later.",
);
/// What that cost in tokens.
pub const PREEMPTED_RECOMPUTED_TOKENS: Metric = Metric::counter(
    "herd_preempted_recomputed_tokens_total",
    "tokens",
    "Tokens, of prompts or generated, computed again after a preemption.",
);
/// What that cost in blocks.
pub const KV_BLOCKS_SWAPPED: Metric = Metric::counter(
    "herd_kv_blocks_swapped_total",
    "blocks",
    "KV blocks of preempted sequences that each rank copied to its host pool.",
);
/// Guesses.
pub const DRAFT_TOKENS: Metric =
    Metric::counter("herd_draft_tokens_total", "tokens", "Tokens guessed ahead and computed.");
/// Guesses that were right.
pub const ACCEPTED_DRAFT_TOKENS: Metric = Metric::counter(
    "herd_accepted_draft_tokens_total",
    "tokens",
    "Tokens guessed ahead that were sampled then.",
);
/// Time in the queue.
pub const QUEUE_SECONDS: Metric = Metric::histogram(
    "herd_queue_seconds",
    "seconds",
    REQUEST_SECONDS,
    "From a request's entry into the engine's queue to its start, reservations of KV blocks included.",
);
/// Time to first token.
pub const TIME_TO_FIRST_TOKEN_SECONDS: Metric = Metric::histogram(
    "herd_time_to_first_token_seconds",
    "seconds",
    REQUEST_SECONDS,
    "From the arrival of a call to its first token. A decode gang's include the prefill and the KV transfer.",
);
/// Time between tokens.
pub const INTER_TOKEN_LATENCY_SECONDS: Metric = Metric::histogram(
    "herd_inter_token_latency_seconds",
    "seconds",
    TOKEN_SECONDS,
    "Between two tokens of a sequence, as they are sampled.",
);
/// Time of a whole answer.
pub const ANSWER_SECONDS: Metric = Metric::histogram(
    "herd_request_seconds",
    "seconds",
    REQUEST_SECONDS,
    "From the arrival of a Decode call to the end of its answer, for those that ended well.",
);
/// Rows clipped.
pub const FP8_ROWS_CLIPPED: Metric = Metric::counter(
    "herd_fp8_rows_clipped_total",
    "rows",
    "Activations (one row a token and FP8 linear) whose largest magnitude was above the checkpoint's bound. Counted by the \
     first rank of the process: all ranks of a gang quantize the same rows.",
);
/// Open transfers.
pub const KV_TRANSFERS_OPEN: Metric =
    Metric::gauge("herd_kv_transfers_open", "transfers", "Transfers that this process waits for.");
/// Transfers that ended.
pub const KV_TRANSFERS: Metric =
    Metric::counter("herd_kv_transfers_total", "transfers", "Transfers this gang received.")
        .by(&[label("outcome", &["completed", "failed"])]);
/// Time of transfers.
pub const KV_TRANSFER_SECONDS: Metric = Metric::histogram(
    "herd_kv_transfer_seconds",
    "seconds",
    REQUEST_SECONDS,
    "From the reservation of KV blocks for a prompt to the last of its KV, which comes as the prompt is computed.",
);
/// Bytes sent.
pub const KV_BYTES_SENT: Metric = Metric::counter(
    "herd_kv_sent_bytes_total",
    "bytes",
    "Bytes of KV frames sent, headers and repeated frames included.",
);
/// Bytes received.
pub const KV_BYTES_RECEIVED: Metric =
    Metric::counter("herd_kv_received_bytes_total", "bytes", "Bytes of KV frames verified and written.");
/// Frames sent.
pub const KV_FRAMES_SENT: Metric =
    Metric::counter("herd_kv_frames_sent_total", "frames", "KV frames sent, repeated ones included.");
/// Frames received.
pub const KV_FRAMES_RECEIVED: Metric =
    Metric::counter("herd_kv_frames_received_total", "frames", "KV frames verified and written.");
/// Frames rejected.
pub const KV_FRAMES_REJECTED: Metric = Metric::counter(
    "herd_kv_frames_rejected_total",
    "frames",
    "KV frames and hellos that were not taken; the sender tries again or gives the transfer up.",
)
.by(&[label(
    "reason",
    &["checksum", "header", "version", "fingerprint", "epoch", "transfer", "rank", "bounds", "over"],
)]);
/// Connections opened again.
pub const KV_RECONNECTS: Metric = Metric::counter(
    "herd_kv_reconnects_total",
    "connections",
    "Retries of transfers: KV connections that broke and were opened again.",
);
/// Renewals of leases.
pub const KV_LEASE_RENEWALS: Metric =
    Metric::counter("herd_kv_lease_renewals_total", "renewals", "Leases on this gang's blocks extended.");
/// Bytes to other ranks.
pub const RANK_BYTES_SENT: Metric = Metric::counter(
    "herd_rank_sent_bytes_total",
    "bytes",
    "Bytes that the ranks of this process gave to those of other processes of the gang.",
);
/// Bytes from other ranks.
pub const RANK_BYTES_RECEIVED: Metric = Metric::counter(
    "herd_rank_received_bytes_total",
    "bytes",
    "Bytes that the ranks of this process got from those of other processes of the gang.",
);
/// Connections between ranks that broke.
pub const RANK_CONNECTIONS_BROKEN: Metric = Metric::counter(
    "herd_rank_connections_broken_total",
    "connections",
    "Connections to other processes of the gang that ended first: broken, closed by the other side, or ended for what came \
     over them. Each ends an epoch.",
);

/// All of them, but for those that every process has.
pub const METRICS: &[&Metric] = &[
    &REQUESTS,
    &REQUESTS_REFUSED,
    &REQUESTS_RUNNING,
    &REQUESTS_WAITING,
    &WAITING_PROMPT_TOKENS,
    &SEQUENCES_LIMIT,
    &REQUESTS_WAITING_LIMIT,
    &TIME_TO_FIRST_TOKEN_SECONDS,
    &INTER_TOKEN_LATENCY_SECONDS,
    &QUEUE_SECONDS,
    &ANSWER_SECONDS,
    &PROMPT_TOKENS,
    &OUTPUT_TOKENS,
    &PREFILL_RECOMPUTED_TOKENS,
    &PREFIX_CACHED_TOKENS,
    &PREEMPTIONS,
    &PREEMPTED_RECOMPUTED_TOKENS,
    &KV_BLOCKS_SWAPPED,
    &DRAFT_TOKENS,
    &ACCEPTED_DRAFT_TOKENS,
    &STEPS,
    &STEP_SECONDS,
    &STEP_TOKENS,
    &STEP_SEQUENCES,
    &FP8_ROWS_CLIPPED,
    &KV_BLOCKS,
    &KV_BLOCKS_USED,
    &KV_USAGE,
    &KV_BLOCK_TOKENS,
    &KV_TRANSFERS_OPEN,
    &KV_TRANSFERS,
    &KV_TRANSFER_SECONDS,
    &KV_BYTES_SENT,
    &KV_BYTES_RECEIVED,
    &KV_FRAMES_SENT,
    &KV_FRAMES_RECEIVED,
    &KV_FRAMES_REJECTED,
    &KV_RECONNECTS,
    &KV_LEASE_RENEWALS,
    &GANG_EPOCH,
    &GANG_EPOCH_LOW,
    &RANK_BYTES_SENT,
    &RANK_BYTES_RECEIVED,
    &RANK_CONNECTIONS_BROKEN,
];

const fn same(name: &'static str, metric: &'static Metric) -> Alias {
    Alias { name, of: AliasOf::Same(metric) }
}

/// What vLLM calls them, newer and older names.
pub const ALIASES: &[Alias] = &[
    same("vllm:num_requests_running", &REQUESTS_RUNNING),
    same("vllm:num_requests_waiting", &REQUESTS_WAITING),
    same("vllm:kv_cache_usage_perc", &KV_USAGE),
    same("vllm:gpu_cache_usage_perc", &KV_USAGE),
    Alias {
        name: "vllm:cache_config_info",
        of: AliasOf::Info(&[("block_size", &KV_BLOCK_TOKENS), ("num_gpu_blocks", &KV_BLOCKS)]),
    },
    same("vllm:prompt_tokens_total", &PROMPT_TOKENS),
    same("vllm:generation_tokens_total", &OUTPUT_TOKENS),
    same("vllm:prefix_cache_hits_total", &PREFIX_CACHED_TOKENS),
    same("vllm:num_preemptions_total", &PREEMPTIONS),
    same("vllm:spec_decode_num_draft_tokens_total", &DRAFT_TOKENS),
    same("vllm:spec_decode_num_accepted_tokens_total", &ACCEPTED_DRAFT_TOKENS),
    same("vllm:time_to_first_token_seconds", &TIME_TO_FIRST_TOKEN_SECONDS),
    same("vllm:inter_token_latency_seconds", &INTER_TOKEN_LATENCY_SECONDS),
    same("vllm:time_per_output_token_seconds", &INTER_TOKEN_LATENCY_SECONDS),
    same("vllm:request_queue_time_seconds", &QUEUE_SECONDS),
    same("vllm:e2e_request_latency_seconds", &ANSWER_SECONDS),
];
