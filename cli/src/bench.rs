//! `herd bench`: load on an OpenAI server, and how it answers.

mod arrivals;
mod client;
mod report;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use self::arrivals::{Arrivals, prompt};
pub(crate) use self::client::Target;
use self::client::{Answer, Ask};
use self::report::{Load, Report, Setup};

/// Requests of an open loop that may be under way: beyond it an arrival is counted as an error and not sent, since this side
/// would be what is measured.
const MAX_UNDER_WAY: usize = 4096;

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// An OpenAI server
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Model to ask; the first one served unless given
    #[arg(long)]
    model: Option<String>,
    /// Requests a second, arriving at random and whether or not earlier ones are answered
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// So many requests at once instead, each sent when one is answered
    #[arg(long, conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: Option<u32>,
    /// Requests in all; 100 unless given
    #[arg(long, conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Seconds in which requests are sent instead
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    duration: Option<u64>,
    /// Tokens of each prompt, which is like no other
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,
    /// Tokens of each answer
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_tokens: u32,
    /// Seconds a request may take
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Of arrivals and prompts: the same seed asks the same at the same times
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write what was measured to this file too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Until the last answer. An error where nothing was answered.
pub(crate) fn run(arguments: &BenchArguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(measure(arguments))?;
    print!("{report}");
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report.json())? + "\n";
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    if report.answered() == 0 {
        bail!("no request was answered");
    }
    Ok(())
}

async fn measure(arguments: &BenchArguments) -> anyhow::Result<Report> {
    let BenchArguments {
        url,
        model,
        rate,
        concurrency,
        requests,
        duration,
        prompt_tokens,
        max_tokens,
        timeout,
        seed,
        json: _,
    } = arguments;
    if !(rate.is_finite() && *rate > 0.0) {
        bail!("--rate {rate} is not above 0");
    }
    let target = Target::new(url)?;
    let model = match model {
        Some(model) => model.clone(),
        None => target.first_model().await?,
    };
    let asked = match (requests, duration) {
        (_, Some(seconds)) => Bound::Until(Duration::from_secs(*seconds)),
        (requests, None) => Bound::Requests(requests.unwrap_or(100)),
    };
    let load = concurrency.map_or(Load::Open { rate: *rate }, |concurrency| Load::Closed { concurrency });
    let asking = Asking {
        target: Arc::new(target),
        model: model.clone(),
        prompt_tokens: *prompt_tokens,
        max_tokens: *max_tokens,
        timeout: Duration::from_secs(*timeout),
        seed: *seed,
    };
    let bar = bar(asked);
    let begun = Instant::now();
    let answers = match load {
        Load::Open { rate } => open(&asking, rate, asked, &bar).await,
        Load::Closed { concurrency } => closed(&asking, concurrency, asked, &bar).await,
    };
    bar.finish_and_clear();
    let setup = Setup {
        url: url.clone(),
        model,
        load,
        prompt_tokens: *prompt_tokens,
        max_tokens: *max_tokens,
        seed: *seed,
    };
    Ok(Report::new(setup, begun.elapsed(), &answers))
}

/// When no more requests are sent.
#[derive(Clone, Copy, Debug)]
enum Bound {
    Requests(u64),
    Until(Duration),
}

impl Bound {
    fn allows(self, sent: u64, elapsed: Duration) -> bool {
        match self {
            Self::Requests(requests) => sent < requests,
            Self::Until(end) => elapsed < end,
        }
    }
}

/// What every request has in common.
#[derive(Clone)]
struct Asking {
    target: Arc<Target>,
    model: String,
    prompt_tokens: u32,
    max_tokens: u32,
    timeout: Duration,
    seed: u64,
}

impl Asking {
    /// Request `number`, due at a time: what it waits to be sent counts too.
    async fn ask(&self, number: u64, due: Instant) -> Answer {
        let Self { target, model, prompt_tokens, max_tokens, timeout, seed } = self;
        let prompt = prompt(*seed, number, *prompt_tokens);
        let ask = Ask { model, prompt: &prompt, max_tokens: *max_tokens, due };
        match tokio::time::timeout(*timeout, target.ask(ask)).await {
            Ok(answer) => answer,
            Err(_) => Answer::failed("timeout"),
        }
    }
}

/// Requests arrive as they are due, whatever becomes of those before.
async fn open(asking: &Asking, rate: f64, bound: Bound, bar: &ProgressBar) -> Vec<Answer> {
    let begun = Instant::now();
    let room = Arc::new(Semaphore::new(MAX_UNDER_WAY));
    let mut arrivals = Arrivals::new(asking.seed, rate);
    let mut answers = Vec::new();
    let mut under_way = JoinSet::new();
    for number in 0.. {
        let due = arrivals.next_after_start();
        if !bound.allows(number, due) {
            break;
        }
        let due = begun + due;
        loop {
            tokio::select! {
                biased;
                () = sleep_until(due) => break,
                Some(answer) = under_way.join_next() => take(&mut answers, answer, bar),
            }
        }
        match Arc::clone(&room).try_acquire_owned() {
            Ok(place) => {
                let asking = asking.clone();
                under_way.spawn(async move {
                    let answer = asking.ask(number, due).await;
                    drop(place);
                    answer
                });
            }
            Err(_) => answers.push(Answer::failed("not sent")),
        }
    }
    while let Some(answer) = under_way.join_next().await {
        take(&mut answers, answer, bar);
    }
    answers
}

/// Each answer makes room for the next request.
async fn closed(asking: &Asking, concurrency: u32, bound: Bound, bar: &ProgressBar) -> Vec<Answer> {
    let begun = Instant::now();
    let mut answers = Vec::new();
    let mut under_way = JoinSet::new();
    for number in 0.. {
        while under_way.len() >= concurrency as usize {
            if let Some(answer) = under_way.join_next().await {
                take(&mut answers, answer, bar);
            }
        }
        if !bound.allows(number, begun.elapsed()) {
            break;
        }
        let asking = asking.clone();
        under_way.spawn(async move { asking.ask(number, Instant::now()).await });
    }
    while let Some(answer) = under_way.join_next().await {
        take(&mut answers, answer, bar);
    }
    answers
}

fn take(answers: &mut Vec<Answer>, answer: Result<Answer, tokio::task::JoinError>, bar: &ProgressBar) {
    answers.push(answer.unwrap_or_else(|_| Answer::failed("internal")));
    bar.set_position(answers.len() as u64);
}

/// On a terminal alone.
fn bar(bound: Bound) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match bound {
        Bound::Requests(requests) => {
            (ProgressBar::new(requests), "{bar:40} {pos} of {len} answered, {per_sec}, {eta} left")
        }
        Bound::Until(_) => (ProgressBar::new_spinner(), "{spinner} {pos} answered, {per_sec}, {elapsed}"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
