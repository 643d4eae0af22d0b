//! What was measured: for people, and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::Answer;

/// What was asked.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) url: String,
    pub(super) model: String,
    pub(super) load: Load,
    pub(super) prompt_tokens: u32,
    pub(super) max_tokens: u32,
    pub(super) seed: u64,
}

/// How requests come.
#[derive(Clone, Copy, Debug)]
pub(super) enum Load {
    /// At this rate, whether or not earlier ones are answered.
    Open { rate: f64 },
    /// So many at once.
    Closed { concurrency: u32 },
}

/// A run.
#[derive(Clone, Debug)]
pub(super) struct Report {
    setup: Setup,
    seconds: f64,
    sent: usize,
    answered: usize,
    errors: BTreeMap<String, u64>,
    prompt_tokens: u64,
    output_tokens: u64,
    first_token: Times,
    gaps: Times,
    a_token: Times,
    whole: Times,
}

/// Seconds, sorted.
#[derive(Clone, Debug, Default)]
struct Times(Vec<f64>);

impl Times {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut seconds: Vec<f64> = times.map(|time| time.as_secs_f64()).collect();
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    /// The smallest one that so large a part does not exceed.
    fn quantile(&self, part: f64) -> Option<f64> {
        let rank = (part * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied()
    }

    fn mean(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.iter().sum::<f64>() / self.0.len() as f64)
    }

    fn json(&self) -> Value {
        json!({
            "count": self.0.len(), "mean": self.mean(), "p50": self.quantile(0.5), "p90": self.quantile(0.9),
            "p99": self.quantile(0.99), "max": self.0.last(),
        })
    }
}

impl Report {
    pub(super) fn new(setup: Setup, took: Duration, answers: &[Answer]) -> Self {
        let mut errors = BTreeMap::new();
        for kind in answers.iter().filter_map(|answer| answer.error.clone()) {
            *errors.entry(kind).or_default() += 1;
        }
        let good = || answers.iter().filter(|answer| answer.error.is_none());
        let a_token = good().filter_map(|answer| {
            let rest = u32::try_from(answer.output_tokens).ok()?.checked_sub(1).filter(|rest| *rest > 0)?;
            Some(answer.whole.saturating_sub(answer.first_token?) / rest)
        });
        Self {
            setup,
            seconds: took.as_secs_f64(),
            sent: answers.len(),
            answered: good().count(),
            errors,
            prompt_tokens: good().map(|answer| answer.prompt_tokens).sum(),
            output_tokens: good().map(|answer| answer.output_tokens).sum(),
            first_token: Times::of(good().filter_map(|answer| answer.first_token)),
            gaps: Times::of(good().flat_map(|answer| answer.gaps.iter().copied())),
            a_token: Times::of(a_token),
            whole: Times::of(good().map(|answer| answer.whole)),
        }
    }

    /// Requests with a whole answer.
    pub(super) fn answered(&self) -> usize {
        self.answered
    }

    fn a_second(&self, count: f64) -> f64 {
        count / self.seconds.max(f64::MIN_POSITIVE)
    }

    pub(super) fn json(&self) -> Value {
        let Setup { url, model, load, prompt_tokens, max_tokens, seed } = &self.setup;
        let load = match load {
            Load::Open { rate } => json!({"kind": "open", "rate": rate}),
            Load::Closed { concurrency } => json!({"kind": "closed", "concurrency": concurrency}),
        };
        json!({
            "setup": {
                "url": url, "model": model, "load": load, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens,
                "seed": seed,
            },
            "seconds": self.seconds,
            "requests": {"sent": self.sent, "answered": self.answered, "errors": self.errors},
            "tokens": {"prompt": self.prompt_tokens, "output": self.output_tokens},
            "per_second": {
                "requests": self.a_second(self.answered as f64), "prompt_tokens": self.a_second(self.prompt_tokens as f64),
                "output_tokens": self.a_second(self.output_tokens as f64),
            },
            "time_to_first_token_seconds": self.first_token.json(),
            "inter_token_latency_seconds": self.gaps.json(),
            "time_per_output_token_seconds": self.a_token.json(),
            "request_seconds": self.whole.json(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setup { url, model, load, prompt_tokens, max_tokens, seed } = &self.setup;
        let load = match load {
            Load::Open { rate } => format!("{rate} requests a second, open loop"),
            Load::Closed { concurrency } => format!("{concurrency} requests at once"),
        };
        writeln!(f, "{model} at {url}: {load}, {prompt_tokens} tokens in, {max_tokens} out, seed {seed}")?;
        let Self { seconds, sent, answered, .. } = self;
        writeln!(f, "{answered} of {sent} requests answered in {seconds:.1} s")?;
        for (kind, count) in &self.errors {
            writeln!(f, "  {count} x {kind}")?;
        }
        writeln!(
            f,
            "{:.2} requests, {:.1} prompt tokens, {:.1} output tokens a second",
            self.a_second(*answered as f64),
            self.a_second(self.prompt_tokens as f64),
            self.a_second(self.output_tokens as f64)
        )?;
        writeln!(f)?;
        writeln!(f, "{:<24}{:>10}{:>10}{:>10}{:>10}{:>10}", "ms", "mean", "p50", "p90", "p99", "max")?;
        for (name, times) in [
            ("time to first token", &self.first_token),
            ("between tokens", &self.gaps),
            ("per output token", &self.a_token),
            ("whole answer", &self.whole),
        ] {
            let cell = |seconds: Option<f64>| match seconds {
                Some(seconds) => format!("{:.1}", seconds * 1000.0),
                None => "-".to_owned(),
            };
            let cells = [
                times.mean(),
                times.quantile(0.5),
                times.quantile(0.9),
                times.quantile(0.99),
                times.0.last().copied(),
            ];
            let [mean, p50, p90, p99, max] = cells.map(cell);
            writeln!(f, "{name:<24}{mean:>10}{p50:>10}{p90:>10}{p99:>10}{max:>10}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let setup = Setup {
            url: "http://host:1".to_owned(),
            model: "m".to_owned(),
            load: Load::Open { rate: 2.5 },
            prompt_tokens: 10,
            max_tokens: 3,
            seed: 7,
        };
        let millis = Duration::from_millis;
        let answer = |first| Answer {
            error: None,
            first_token: Some(millis(first)),
            whole: millis(first + 40),
            gaps: vec![millis(15), millis(25)],
            prompt_tokens: 10,
            output_tokens: 3,
        };
        let failed = ["status 429", "status 429", "broken stream"].map(Answer::failed);
        let answers: Vec<_> = (1..=5).map(|number| answer(100 * number)).chain(failed).collect();
        Report::new(setup, Duration::from_secs(2), &answers)
    }

    #[test]
    fn it_reads_like_this() {
        let expected = "\
m at http://host:1: 2.5 requests a second, open loop, 10 tokens in, 3 out, seed 7
5 of 8 requests answered in 2.0 s
  1 x broken stream
  2 x status 429
2.50 requests, 25.0 prompt tokens, 7.5 output tokens a second

ms                            mean       p50       p90       p99       max
time to first token          300.0     300.0     500.0     500.0     500.0
between tokens                20.0      15.0      25.0      25.0      25.0
per output token              20.0      20.0      20.0      20.0      20.0
whole answer                 340.0     340.0     540.0     540.0     540.0
";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn as_json_it_is_this() {
        let json = report().json();
        let expected = json!({"kind": "open", "rate": 2.5});
        assert_eq!(json["setup"]["load"], expected);
        assert_eq!(
            json["requests"],
            json!({"sent": 8, "answered": 5, "errors": {"broken stream": 1, "status 429": 2}})
        );
        assert_eq!(json["tokens"], json!({"prompt": 50, "output": 15}));
        assert_eq!(json["time_to_first_token_seconds"]["p90"], 0.5);
        assert_eq!(json["inter_token_latency_seconds"]["count"], 10);
        let keys: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            [
                "setup",
                "seconds",
                "requests",
                "tokens",
                "per_second",
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "time_per_output_token_seconds",
                "request_seconds"
            ]
        );
    }

    #[test]
    fn nothing_answered_is_no_number() {
        let setup = report().setup;
        let report = Report::new(setup, Duration::from_secs(1), &[Answer::failed("no connection")]);
        assert!(report.to_string().contains("time to first token              -"));
        assert_eq!(report.json()["request_seconds"]["p99"], Value::Null);
    }
}
