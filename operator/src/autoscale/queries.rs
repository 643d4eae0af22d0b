//! The queries, and what their answers say of each pod. They select by the labels `namespace` and `pod` alone, which every
//! configuration for Kubernetes sets.

use std::collections::HashMap;

use futures::future::try_join_all;
use herd_control::autoscale::{Reading, Sample};

use super::prometheus::{Point, Prometheus, PrometheusError};

/// What is asked for of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Metric {
    PromptTokens,
    Steps,
    StepSeconds,
    WaitingPromptTokens,
    Running,
    Waiting,
    SequencesLimit,
    KvBlocks,
    KvBlocksUsed,
}

/// Counters, of which there are rates.
const RATES: [Metric; 3] = [Metric::PromptTokens, Metric::Steps, Metric::StepSeconds];
const GAUGES: [Metric; 6] = [
    Metric::WaitingPromptTokens,
    Metric::Running,
    Metric::Waiting,
    Metric::SequencesLimit,
    Metric::KvBlocks,
    Metric::KvBlocksUsed,
];
const METRICS: usize = RATES.len() + GAUGES.len();

impl Metric {
    const fn name(self) -> &'static str {
        match self {
            Self::PromptTokens => "herd_prompt_tokens_total",
            Self::Steps => "herd_step_seconds_count",
            Self::StepSeconds => "herd_step_seconds_sum",
            Self::WaitingPromptTokens => "herd_waiting_prompt_tokens",
            Self::Running => "herd_requests_running",
            Self::Waiting => "herd_requests_waiting",
            Self::SequencesLimit => "herd_sequences_limit",
            Self::KvBlocks => "herd_kv_blocks",
            Self::KvBlocksUsed => "herd_kv_blocks_used",
        }
    }

    /// What it can be. A busy gang that could not be scraped for long seems to have had more than one second in a second.
    fn is_possible(self, value: f64) -> bool {
        let bounds = match self {
            Self::StepSeconds => 0.0..=4.0,
            Self::SequencesLimit | Self::KvBlocks => 1.0..=1e12,
            _ => 0.0..=1e12,
        };
        bounds.contains(&value)
    }
}

/// What Prometheus knows of the pods.
#[derive(Clone, Debug, Default)]
pub(super) struct Gathered(HashMap<String, HashMap<String, OfPod>>);

/// Seconds since 1970 where they are times.
#[derive(Clone, Copy, Debug, Default)]
struct OfPod {
    values: [Option<f64>; METRICS],
    scraped: Option<f64>,
    answered: f64,
}

/// The queries of a fleet.
#[derive(Clone, Debug)]
pub(super) struct Queries {
    gauges: String,
    scraped: String,
    rates: Vec<(Metric, String)>,
}

impl Queries {
    /// Of one namespace, or all.
    pub(super) fn new(namespace: Option<&str>, rate_window_ms: i64) -> Self {
        // Names of namespaces have no characters that mean something in a query.
        let of = namespace.map(|name| format!("namespace=\"{name}\"")).unwrap_or_default();
        let names = GAUGES.map(Metric::name).join("|");
        let gauges = format!("max by (__name__, namespace, pod) ({{__name__=~\"{names}\",{of}}})");
        let scraped = format!("max by (namespace, pod) (timestamp({}{{{of}}}))", Metric::KvBlocks.name());
        // A process that was started anew counts from 0: its rate would be of two processes.
        let rates = RATES.map(|metric| {
            let series = format!("{}{{{of}}}[{rate_window_ms}ms]", metric.name());
            let query = format!("max by (namespace, pod) (rate({series}) unless resets({series}) > 0)");
            (metric, query)
        });
        Self { gauges, scraped, rates: rates.to_vec() }
    }

    /// Asks all of them at once.
    pub(super) async fn ask(&self, prometheus: &Prometheus) -> Result<Gathered, PrometheusError> {
        let Self { gauges, scraped, rates } = self;
        let queries = [gauges, scraped].into_iter().chain(rates.iter().map(|(_, query)| query));
        let at = prometheus.find().await?;
        let answers = try_join_all(queries.map(|query| prometheus.query(&at, query))).await?;
        let mut gathered = Gathered::default();
        for (index, answer) in answers.into_iter().enumerate() {
            for point in answer {
                match index {
                    0 => gathered.gauge(&point),
                    1 => gathered.scraped(&point),
                    _ => gathered.put(&point, rates[index - 2].0),
                }
            }
        }
        Ok(gathered)
    }
}

impl Gathered {
    fn of(&mut self, point: &Point) -> Option<&mut OfPod> {
        let (namespace, pod) = (point.metric.namespace.as_ref()?, point.metric.pod.as_ref()?);
        Some(self.0.entry(namespace.clone()).or_default().entry(pod.clone()).or_default())
    }

    fn gauge(&mut self, point: &Point) {
        let name = point.metric.name.as_deref();
        if let Some(metric) = GAUGES.into_iter().find(|metric| Some(metric.name()) == name) {
            self.put(point, metric);
        }
    }

    fn put(&mut self, point: &Point, metric: Metric) {
        if let Some(pod) = self.of(point) {
            pod.values[metric as usize] = Some(point.value());
        }
    }

    fn scraped(&mut self, point: &Point) {
        if let Some(pod) = self.of(point) {
            (pod.scraped, pod.answered) = (Some(point.value()), point.time());
        }
    }

    /// Of one pod.
    pub(super) fn reading(&self, namespace: &str, pod: &str) -> Reading {
        let unknown = OfPod::default();
        let known = self.0.get(namespace).and_then(|pods| pods.get(pod)).unwrap_or(&unknown);
        match known.sample() {
            Ok(sample) => Reading::Sample(sample),
            Err(reading) => reading,
        }
    }
}

impl OfPod {
    fn sample(&self) -> Result<Sample, Reading> {
        let name = |metric: Metric| metric.name().to_owned();
        let invalid = |metric| Reading::Invalid { metric: name(metric) };
        let value = |metric: Metric, scale: f64| match self.values[metric as usize] {
            None => Err(Reading::Missing { metric: name(metric) }),
            Some(value) if !metric.is_possible(value) => Err(invalid(metric)),
            Some(value) => Ok((value * scale).round() as u64),
        };
        let sample = Sample {
            kv_blocks: value(Metric::KvBlocks, 1.0)?,
            kv_blocks_used: value(Metric::KvBlocksUsed, 1.0)?,
            running: value(Metric::Running, 1.0)?,
            waiting: value(Metric::Waiting, 1.0)?,
            waiting_prompt_tokens: value(Metric::WaitingPromptTokens, 1.0)?,
            sequences_limit: value(Metric::SequencesLimit, 1.0)?,
            prompt_tokens_per_1000s: value(Metric::PromptTokens, 1e3)?,
            steps_per_1000s: value(Metric::Steps, 1e3)?,
            busy_ms_per_s: value(Metric::StepSeconds, 1e3)?,
            scraped_ms: 0,
            age_ms: 0,
        };
        let scraped = self.scraped.ok_or(Reading::Missing { metric: name(Metric::KvBlocks) })?;
        let ms = |seconds: f64| (seconds * 1e3).round() as i64;
        // A scrape of the future is of a clock that cannot be trusted.
        if !scraped.is_finite() || ms(self.answered) < ms(scraped) {
            return Err(invalid(Metric::KvBlocks));
        }
        Ok(Sample { scraped_ms: ms(scraped), age_ms: ms(self.answered) - ms(scraped), ..sample })
    }
}
