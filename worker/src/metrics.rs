//! What `/metrics` says. One page a worker: several live in one process.
//!
//! The step loop observes into histograms and never waits for a scrape: they count in atomics, and a scrape that reads one
//! waits for those that are about to count, not the other way round.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use herd_engine::{Engine, EngineCounters, EngineLoad, Observer, RowsClipped, StepDone};
use herd_metrics::{Family, Page, PageBuilder, PageError, worker as declared};
use prometheus::{Gauge, Histogram, IntCounter, IntGauge};
use tonic::Status;

use crate::gang::Gang;
use crate::refusal::reason;
use crate::transfer::Reject;

/// How the page speaks.
#[derive(Clone, Debug)]
pub struct MetricOptions {
    /// Whether numbers are also there under the names that vLLM gives them.
    pub aliases: bool,
    /// The model's name in the labels of those.
    pub model: String,
}

impl Default for MetricOptions {
    fn default() -> Self {
        Self { aliases: true, model: String::new() }
    }
}

/// All metrics of one worker.
#[derive(Debug)]
pub(crate) struct Metrics {
    page: Page,
    model: String,
    /// Counted in epochs that are over. Held while counters are raised, so that two scrapes do not raise them twice.
    before: Mutex<EngineCounters>,
    clipped: OnceLock<RowsClipped>,
    requests: Family<IntCounter>,
    refused: Family<IntCounter>,
    requests_running: IntGauge,
    requests_waiting: IntGauge,
    waiting_prompt_tokens: IntGauge,
    sequences_limit: IntGauge,
    requests_waiting_limit: IntGauge,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    queue: Histogram,
    request_seconds: Histogram,
    prompt_tokens: IntCounter,
    output_tokens: IntCounter,
    prefill_recomputed_tokens: IntCounter,
    prefix_cached_tokens: IntCounter,
    preemptions: IntCounter,
    preempted_recomputed_tokens: IntCounter,
    kv_blocks_swapped: IntCounter,
    draft_tokens: IntCounter,
    accepted_draft_tokens: IntCounter,
    steps: IntCounter,
    step_seconds: Histogram,
    step_tokens: Histogram,
    step_sequences: Histogram,
    fp8_rows_clipped: IntCounter,
    kv_blocks: IntGauge,
    kv_blocks_used: IntGauge,
    kv_usage: Gauge,
    kv_block_tokens: IntGauge,
    transfers_open: IntGauge,
    kv_transfers: Family<IntCounter>,
    kv_transfer_seconds: Histogram,
    kv_bytes_sent: IntCounter,
    kv_bytes_received: IntCounter,
    kv_frames_sent: IntCounter,
    kv_frames_received: IntCounter,
    kv_frames_rejected: Family<IntCounter>,
    kv_reconnects: IntCounter,
    kv_lease_renewals: IntCounter,
    gang_epoch: IntGauge,
    gang_epoch_low: IntGauge,
    rank_bytes_sent: IntCounter,
    rank_bytes_received: IntCounter,
    rank_connections_broken: IntCounter,
}

/// Calls that are counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Decode,
    Prefill,
}

impl Call {
    const fn label(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Prefill => "prefill",
        }
    }
}

impl Metrics {
    /// All at 0, every label value there from the start.
    pub(crate) fn new(options: MetricOptions) -> Result<Self, PageError> {
        let MetricOptions { aliases, model } = options;
        let mut page =
            PageBuilder::new(declared::METRICS)?.with_aliases(if aliases { declared::ALIASES } else { &[] });
        Ok(Self {
            model,
            before: Mutex::default(),
            clipped: OnceLock::new(),
            requests: page.counters(&declared::REQUESTS)?,
            refused: page.counters(&declared::REQUESTS_REFUSED)?,
            requests_running: page.gauge(&declared::REQUESTS_RUNNING)?,
            requests_waiting: page.gauge(&declared::REQUESTS_WAITING)?,
            waiting_prompt_tokens: page.gauge(&declared::WAITING_PROMPT_TOKENS)?,
            sequences_limit: page.gauge(&declared::SEQUENCES_LIMIT)?,
            requests_waiting_limit: page.gauge(&declared::REQUESTS_WAITING_LIMIT)?,
            time_to_first_token: page.histogram(&declared::TIME_TO_FIRST_TOKEN_SECONDS)?,
            inter_token_latency: page.histogram(&declared::INTER_TOKEN_LATENCY_SECONDS)?,
            queue: page.histogram(&declared::QUEUE_SECONDS)?,
            request_seconds: page.histogram(&declared::ANSWER_SECONDS)?,
            prompt_tokens: page.counter(&declared::PROMPT_TOKENS)?,
            output_tokens: page.counter(&declared::OUTPUT_TOKENS)?,
            prefill_recomputed_tokens: page.counter(&declared::PREFILL_RECOMPUTED_TOKENS)?,
            prefix_cached_tokens: page.counter(&declared::PREFIX_CACHED_TOKENS)?,
            preemptions: page.counter(&declared::PREEMPTIONS)?,
            preempted_recomputed_tokens: page.counter(&declared::PREEMPTED_RECOMPUTED_TOKENS)?,
            kv_blocks_swapped: page.counter(&declared::KV_BLOCKS_SWAPPED)?,
            draft_tokens: page.counter(&declared::DRAFT_TOKENS)?,
            accepted_draft_tokens: page.counter(&declared::ACCEPTED_DRAFT_TOKENS)?,
            steps: page.counter(&declared::STEPS)?,
            step_seconds: page.histogram(&declared::STEP_SECONDS)?,
            step_tokens: page.histogram(&declared::STEP_TOKENS)?,
            step_sequences: page.histogram(&declared::STEP_SEQUENCES)?,
            fp8_rows_clipped: page.counter(&declared::FP8_ROWS_CLIPPED)?,
            kv_blocks: page.gauge(&declared::KV_BLOCKS)?,
            kv_blocks_used: page.gauge(&declared::KV_BLOCKS_USED)?,
            kv_usage: page.fraction(&declared::KV_USAGE)?,
            kv_block_tokens: page.gauge(&declared::KV_BLOCK_TOKENS)?,
            transfers_open: page.gauge(&declared::KV_TRANSFERS_OPEN)?,
            kv_transfers: page.counters(&declared::KV_TRANSFERS)?,
            kv_transfer_seconds: page.histogram(&declared::KV_TRANSFER_SECONDS)?,
            kv_bytes_sent: page.counter(&declared::KV_BYTES_SENT)?,
            kv_bytes_received: page.counter(&declared::KV_BYTES_RECEIVED)?,
            kv_frames_sent: page.counter(&declared::KV_FRAMES_SENT)?,
            kv_frames_received: page.counter(&declared::KV_FRAMES_RECEIVED)?,
            kv_frames_rejected: page.counters(&declared::KV_FRAMES_REJECTED)?,
            kv_reconnects: page.counter(&declared::KV_RECONNECTS)?,
            kv_lease_renewals: page.counter(&declared::KV_LEASE_RENEWALS)?,
            gang_epoch: page.gauge(&declared::GANG_EPOCH)?,
            gang_epoch_low: page.gauge(&declared::GANG_EPOCH_LOW)?,
            rank_bytes_sent: page.counter(&declared::RANK_BYTES_SENT)?,
            rank_bytes_received: page.counter(&declared::RANK_BYTES_RECEIVED)?,
            rank_connections_broken: page.counter(&declared::RANK_CONNECTIONS_BROKEN)?,
            page: page.finish()?,
        })
    }

    /// Of each rank.
    pub(crate) fn kv(&self, blocks: usize, block_tokens: usize) {
        self.kv_blocks.set(blocks as i64);
        self.kv_block_tokens.set(block_tokens as i64);
    }

    pub(crate) fn limits(&self, engine: &Engine) {
        self.sequences_limit.set(engine.limits().running_sequences() as i64);
        self.requests_waiting_limit.set(engine.limits().max_waiting as i64);
    }

    pub(crate) fn clipped(&self, rows: RowsClipped) {
        self.clipped.get_or_init(|| rows);
    }

    pub(crate) fn request(&self, call: Call) {
        count(&self.requests, &[call.label()]);
    }

    /// Counts a call that is refused; gives the refusal back.
    pub(crate) fn refused(&self, call: Call, status: Status) -> Status {
        count(&self.refused, &[call.label(), reason(&status)]);
        status
    }

    pub(crate) fn first_token(&self, after: Duration) {
        self.time_to_first_token.observe(after.as_secs_f64());
    }

    pub(crate) fn answered(&self, after: Duration) {
        self.request_seconds.observe(after.as_secs_f64());
    }

    pub(crate) fn frame_sent(&self, bytes: usize) {
        self.kv_frames_sent.inc();
        self.kv_bytes_sent.inc_by(bytes as u64);
    }

    pub(crate) fn frame_received(&self, bytes: usize) {
        self.kv_frames_received.inc();
        self.kv_bytes_received.inc_by(bytes as u64);
    }

    pub(crate) fn frame_rejected(&self, reject: Reject) {
        count(&self.kv_frames_rejected, &[reject.reason()]);
    }

    pub(crate) fn kv_reconnected(&self) {
        self.kv_reconnects.inc();
    }

    pub(crate) fn lease_renewed(&self) {
        self.kv_lease_renewals.inc();
    }

    /// A transfer whose KV has all come.
    pub(crate) fn transferred(&self, within: Duration) {
        self.kv_transfer_seconds.observe(within.as_secs_f64());
    }

    pub(crate) fn transfer_ended(&self, completed: bool) {
        count(&self.kv_transfers, &[if completed { "completed" } else { "failed" }]);
    }

    pub(crate) fn rank_sent(&self, bytes: usize) {
        self.rank_bytes_sent.inc_by(bytes as u64);
    }

    pub(crate) fn rank_received(&self, bytes: usize) {
        self.rank_bytes_received.inc_by(bytes as u64);
    }

    pub(crate) fn rank_connection_broke(&self) {
        self.rank_connections_broken.inc();
    }

    fn before(&self) -> MutexGuard<'_, EngineCounters> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next engine counts from 0 again.
    pub(crate) fn epoch_ended(&self, counted: EngineCounters) {
        let mut before = self.before();
        *before = sum(*before, counted);
    }

    /// The page, in Prometheus's text format.
    pub(crate) fn render(&self, gang: Option<&Gang>, transfers: usize) -> Result<String, prometheus::Error> {
        let engine = gang.map(|gang| &gang.engine);
        let EngineLoad { running, waiting, waiting_prompt_tokens, kv_blocks_used } =
            engine.map_or_else(EngineLoad::default, Engine::busy);
        self.requests_running.set(running as i64);
        self.requests_waiting.set(waiting as i64);
        self.waiting_prompt_tokens.set(waiting_prompt_tokens as i64);
        self.kv_blocks_used.set(kv_blocks_used as i64);
        self.kv_usage.set(kv_blocks_used as f64 / self.kv_blocks.get().max(1) as f64);
        self.transfers_open.set(transfers as i64);
        let epoch = gang.map_or(0, |gang| gang.identity.epoch);
        self.gang_epoch.set(epoch as i64);
        self.gang_epoch_low.set(low(epoch));
        let before = self.before();
        let EngineCounters {
            steps,
            prompt_tokens,
            output_tokens,
            prefill_recomputed_tokens,
            prefix_cached_tokens,
            preemptions,
            preempted_recomputed_tokens,
            swapped_blocks,
            draft_tokens,
            accepted_draft_tokens,
        } = sum(*before, engine.map_or_else(EngineCounters::default, Engine::counters));
        raise(&self.steps, steps);
        raise(&self.prompt_tokens, prompt_tokens);
        raise(&self.output_tokens, output_tokens);
        raise(&self.prefill_recomputed_tokens, prefill_recomputed_tokens);
        raise(&self.prefix_cached_tokens, prefix_cached_tokens);
        raise(&self.preemptions, preemptions);
        raise(&self.preempted_recomputed_tokens, preempted_recomputed_tokens);
        raise(&self.kv_blocks_swapped, swapped_blocks);
        raise(&self.draft_tokens, draft_tokens);
        raise(&self.accepted_draft_tokens, accepted_draft_tokens);
        raise(&self.fp8_rows_clipped, self.clipped.get().map_or(0, RowsClipped::get));
        drop(before);
        self.page.text(&self.model)
    }
}

impl Observer for Metrics {
    fn started(&self, queued: Duration) {
        self.queue.observe(queued.as_secs_f64());
    }

    fn stepped(&self, step: StepDone) {
        let StepDone { time, tokens, sequences } = step;
        self.step_seconds.observe(time.as_secs_f64());
        self.step_tokens.observe(tokens as f64);
        self.step_sequences.observe(sequences as f64);
    }

    fn token(&self, since_the_last: Duration) {
        self.inter_token_latency.observe(since_the_last.as_secs_f64());
    }
}

/// Times of one answer, from the arrival of its call.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    metrics: Arc<Metrics>,
    arrived: tokio::time::Instant,
    first_token: bool,
}

impl Stopwatch {
    pub(crate) fn start(metrics: &Arc<Metrics>) -> Self {
        Self { metrics: Arc::clone(metrics), arrived: tokio::time::Instant::now(), first_token: false }
    }

    /// There are tokens.
    pub(crate) fn token(&mut self) {
        if !std::mem::replace(&mut self.first_token, true) {
            self.metrics.first_token(self.arrived.elapsed());
        }
    }

    /// It ended well.
    pub(crate) fn answered(self) {
        self.metrics.answered(self.arrived.elapsed());
    }
}

/// What is not declared is not counted; that all there is is declared is tested.
fn count(family: &Family<IntCounter>, labels: &[&str]) {
    if let Some(counter) = family.of(labels) {
        counter.inc();
    }
}

fn sum(before: EngineCounters, now: EngineCounters) -> EngineCounters {
    let EngineCounters {
        steps,
        prompt_tokens,
        output_tokens,
        prefill_recomputed_tokens,
        prefix_cached_tokens,
        preemptions,
        preempted_recomputed_tokens,
        swapped_blocks,
        draft_tokens,
        accepted_draft_tokens,
    } = now;
    EngineCounters {
        steps: before.steps + steps,
        prompt_tokens: before.prompt_tokens + prompt_tokens,
        output_tokens: before.output_tokens + output_tokens,
        prefill_recomputed_tokens: before.prefill_recomputed_tokens + prefill_recomputed_tokens,
        prefix_cached_tokens: before.prefix_cached_tokens + prefix_cached_tokens,
        preemptions: before.preemptions + preemptions,
        preempted_recomputed_tokens: before.preempted_recomputed_tokens + preempted_recomputed_tokens,
        swapped_blocks: before.swapped_blocks + swapped_blocks,
        draft_tokens: before.draft_tokens + draft_tokens,
        accepted_draft_tokens: before.accepted_draft_tokens + accepted_draft_tokens,
    }
}

/// Takes a counter to what another one counted.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// The last 32 bits: a number that Prometheus, which counts in 64-bit floats, keeps as it is.
fn low(epoch: u64) -> i64 {
    (epoch & u64::from(u32::MAX)) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_there_is_is_declared() {
        let metrics = Metrics::new(MetricOptions::default()).unwrap();
        for reject in Reject::ALL {
            assert!(metrics.kv_frames_rejected.of(&[reject.reason()]).is_some(), "{reject:?}");
        }
        for call in [Call::Decode, Call::Prefill] {
            assert!(metrics.requests.of(&[call.label()]).is_some());
            for reason in crate::refusal::REASONS {
                assert!(metrics.refused.of(&[call.label(), reason]).is_some(), "{reason}");
            }
        }
        for outcome in ["completed", "failed"] {
            assert!(metrics.kv_transfers.of(&[outcome]).is_some());
        }
    }

    #[test]
    fn a_page_that_is_read_twice_says_the_same() {
        let metrics = Metrics::new(MetricOptions::default()).unwrap();
        metrics.epoch_ended(EngineCounters { steps: 3, prompt_tokens: 5, ..EngineCounters::default() });
        for _ in 0..2 {
            let page = metrics.render(None, 0).unwrap();
            assert!(page.contains("herd_steps_total 3\n") && page.contains("herd_prompt_tokens_total 5\n"));
        }
    }

    #[test]
    fn aliases_can_be_left_out() {
        let page = |aliases| {
            let metrics = Metrics::new(MetricOptions { aliases, model: "m".to_owned() }).unwrap();
            metrics.kv(8, 64);
            metrics.render(None, 0).unwrap()
        };
        let with = page(true);
        assert!(with.contains("vllm:num_requests_running{model_name=\"m\"} 0\n"), "{with}");
        let info = "vllm:cache_config_info{block_size=\"64\",num_gpu_blocks=\"8\",model_name=\"m\"} 1\n";
        assert!(with.contains(info), "{with}");
        assert!(!page(false).contains("vllm:"));
    }

    #[test]
    fn two_starts_that_prometheus_rounds_to_one_are_told_apart() {
        let first = crate::identity::new_epoch() & !0xFF;
        let second = first | 1;
        let kept = |value: i64| value as f64 as i64;
        assert_eq!(kept(first as i64), kept(second as i64));
        assert_ne!(kept(low(first)), kept(low(second)));
        assert_eq!(kept(low(u64::MAX)), i64::from(u32::MAX));
    }
}
