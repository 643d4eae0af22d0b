//! What `/metrics` says. One registry a worker: several live in one process.

use std::sync::{Mutex, MutexGuard, PoisonError};

use herd_engine::{Engine, EngineCounters, EngineLoad};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use crate::transfer::Reject;

/// All metrics of one worker.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// Counted in epochs that are over.
    before: Mutex<EngineCounters>,
    requests: IntCounterVec,
    requests_running: IntGauge,
    requests_waiting: IntGauge,
    waiting_prompt_tokens: IntGauge,
    kv_blocks: IntGauge,
    kv_blocks_used: IntGauge,
    transfers_open: IntGauge,
    steps: IntCounter,
    prompt_tokens: IntCounter,
    output_tokens: IntCounter,
    prefill_recomputed_tokens: IntCounter,
    kv_frames_sent: IntCounter,
    kv_frames_received: IntCounter,
    kv_frames_rejected: IntCounterVec,
    kv_reconnects: IntCounter,
    kv_lease_renewals: IntCounter,
    kv_transfers: IntCounterVec,
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
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name, help| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let counter = |name, help| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let counters = |name, help, label| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let metrics = Self {
            requests: counters("herd_requests_total", "Requests taken, by call.", "call")?,
            requests_running: gauge("herd_requests_running", "Sequences that run, reservations included.")?,
            requests_waiting: gauge("herd_requests_waiting", "Requests in the engine's queue.")?,
            waiting_prompt_tokens: gauge("herd_waiting_prompt_tokens", "Their prompt tokens.")?,
            kv_blocks: gauge("herd_kv_blocks", "KV blocks a rank has.")?,
            kv_blocks_used: gauge("herd_kv_blocks_used", "KV blocks that are owned.")?,
            transfers_open: gauge("herd_kv_transfers_open", "Transfers this gang waits for.")?,
            steps: counter("herd_steps_total", "Forward passes.")?,
            prompt_tokens: counter("herd_prompt_tokens_total", "Prompt tokens computed.")?,
            output_tokens: counter("herd_output_tokens_total", "Tokens sampled.")?,
            prefill_recomputed_tokens: counter(
                "herd_prefill_recomputed_tokens_total",
                "Prompt tokens computed although their KV came from a prefill gang; anything but 0 is a mistake.",
            )?,
            kv_frames_sent: counter("herd_kv_frames_sent_total", "KV frames sent, repeated ones included.")?,
            kv_frames_received: counter("herd_kv_frames_received_total", "KV frames verified and written.")?,
            kv_frames_rejected: counters(
                "herd_kv_frames_rejected_total",
                "KV frames and hellos that were not taken, by reason.",
                "reason",
            )?,
            kv_reconnects: counter(
                "herd_kv_reconnects_total",
                "KV connections that broke and were opened again.",
            )?,
            kv_lease_renewals: counter(
                "herd_kv_lease_renewals_total",
                "Leases on this gang's blocks extended.",
            )?,
            kv_transfers: counters(
                "herd_kv_transfers_total",
                "Transfers this gang received, by outcome.",
                "outcome",
            )?,
            before: Mutex::default(),
            registry,
        };
        for call in [Call::Decode, Call::Prefill] {
            metrics.requests.with_label_values(&[call.label()]);
        }
        for reject in Reject::ALL {
            metrics.kv_frames_rejected.with_label_values(&[reject.reason()]);
        }
        for outcome in ["completed", "failed"] {
            metrics.kv_transfers.with_label_values(&[outcome]);
        }
        Ok(metrics)
    }

    pub(crate) fn kv_blocks(&self, blocks: usize) {
        self.kv_blocks.set(blocks as i64);
    }

    pub(crate) fn request(&self, call: Call) {
        self.requests.with_label_values(&[call.label()]).inc();
    }

    pub(crate) fn frame_sent(&self) {
        self.kv_frames_sent.inc();
    }

    pub(crate) fn frame_received(&self) {
        self.kv_frames_received.inc();
    }

    pub(crate) fn frame_rejected(&self, reject: Reject) {
        self.kv_frames_rejected.with_label_values(&[reject.reason()]).inc();
    }

    pub(crate) fn kv_reconnected(&self) {
        self.kv_reconnects.inc();
    }

    pub(crate) fn lease_renewed(&self) {
        self.kv_lease_renewals.inc();
    }

    pub(crate) fn transfer_ended(&self, completed: bool) {
        let outcome = if completed { "completed" } else { "failed" };
        self.kv_transfers.with_label_values(&[outcome]).inc();
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
    pub(crate) fn render(
        &self,
        engine: Option<&Engine>,
        transfers: usize,
    ) -> Result<String, prometheus::Error> {
        let EngineLoad { running, waiting, waiting_prompt_tokens, kv_blocks_used } =
            engine.map_or_else(EngineLoad::default, |engine| *engine.load().borrow());
        self.requests_running.set(running as i64);
        self.requests_waiting.set(waiting as i64);
        self.waiting_prompt_tokens.set(waiting_prompt_tokens as i64);
        self.kv_blocks_used.set(kv_blocks_used as i64);
        let now = engine.map_or_else(EngineCounters::default, Engine::counters);
        let EngineCounters { steps, prompt_tokens, output_tokens, prefill_recomputed_tokens } =
            sum(*self.before(), now);
        raise(&self.steps, steps);
        raise(&self.prompt_tokens, prompt_tokens);
        raise(&self.output_tokens, output_tokens);
        raise(&self.prefill_recomputed_tokens, prefill_recomputed_tokens);
        self.transfers_open.set(transfers as i64);
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn sum(before: EngineCounters, now: EngineCounters) -> EngineCounters {
    let EngineCounters { steps, prompt_tokens, output_tokens, prefill_recomputed_tokens } = now;
    EngineCounters {
        steps: before.steps + steps,
        prompt_tokens: before.prompt_tokens + prompt_tokens,
        output_tokens: before.output_tokens + output_tokens,
        prefill_recomputed_tokens: before.prefill_recomputed_tokens + prefill_recomputed_tokens,
    }
}

/// Takes a counter to what another one counted.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}
