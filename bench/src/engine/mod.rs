//! The engine against llama.cpp: the same weights, the same threads, in turns. Each turn is a process of its own, ours too,
//! so that both load, and their memory can be compared.

mod machine;
mod model;
mod peer;
mod turn;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use herd_engine::Isa;
use serde::Deserialize;
use serde_json::{Value, json};

pub(crate) use self::model::make as make_model;
pub(crate) use self::turn::{TurnArgs, run as run_turn};

use crate::measure::Samples;

/// What is measured of each format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// Tokens of one prompt.
    Prefill(usize),
    /// Sequences that each generate [`GENERATED`] tokens after a prompt of [`PROMPT`].
    Decode(usize),
}

pub(crate) const PROMPT: usize = 128;
pub(crate) const GENERATED: usize = 128;

const WORKS: [Work; 5] =
    [Work::Prefill(512), Work::Prefill(2048), Work::Decode(1), Work::Decode(8), Work::Decode(32)];

impl Work {
    fn name(self) -> String {
        match self {
            Self::Prefill(tokens) => format!("prefill {tokens}"),
            Self::Decode(sequences) => format!("decode {sequences}"),
        }
    }

    /// The ratio to the better of the peer's formats that is asked for.
    fn goal(self, bf16: bool) -> Option<f64> {
        match self {
            Self::Prefill(_) if bf16 => Some(1.5),
            Self::Prefill(_) => Some(1.2),
            Self::Decode(8) => Some(1.5),
            Self::Decode(32) => Some(1.7),
            Self::Decode(_) => None,
        }
    }
}

/// What a turn has given.
#[derive(Debug, Default)]
struct Turn {
    /// Tokens a second, in the order of [`WORKS`].
    rates: [f64; WORKS.len()],
    peak_bytes: f64,
}

#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Folder with `SmolLM2` in `fbgemm_fp8`.
    #[arg(long)]
    fbgemm: PathBuf,
    /// Folder with `SmolLM2`, all linears in FP8.
    #[arg(long)]
    all_fp8: PathBuf,
    /// Folder with a model of the shape of Llama 3.2 1B.
    #[arg(long)]
    large: PathBuf,
    /// Folder with llama.cpp's programs.
    #[arg(long)]
    peer: PathBuf,
    /// `SmolLM2` for it, in `Q8_0`.
    #[arg(long)]
    q8_0: PathBuf,
    /// `SmolLM2` for it, in F16.
    #[arg(long)]
    f16: PathBuf,
    /// Turns of each, of which the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Instructions ours compute with; the best of this CPU unless given.
    #[arg(long)]
    isa: Option<Isa>,
    /// Where the figures go, as JSON.
    #[arg(long)]
    pub(crate) out: PathBuf,
}

/// Whether every goal is met.
pub(crate) fn run(arguments: &EngineArgs) -> Result<(Value, bool)> {
    let EngineArgs { fbgemm, all_fp8, large, peer, q8_0, f16, rounds, isa, out: _ } = arguments;
    let rounds = (*rounds).max(1);
    let threads = std::thread::available_parallelism()?.get();
    let isa = isa.unwrap_or_else(Isa::detect);
    let machine = machine::measure(isa, threads)?;
    println!(
        "{threads} threads, {isa}: memory {:.1} GB/s, page cache {:.1} GB/s, products {:.0} billion multiply-adds/s",
        machine.memory / 1e9,
        machine.page_cache / 1e9,
        machine.multiply_adds / 1e9
    );
    let on = On { threads, isa };
    let formats: [(&str, &dyn Fn() -> Result<Turn>); 4] = [
        ("fbgemm_fp8", &|| ours(fbgemm, on)),
        ("all-linears FP8", &|| ours(all_fp8, on)),
        ("llama.cpp Q8_0", &|| peer::turn(peer, q8_0, threads)),
        ("llama.cpp F16", &|| peer::turn(peer, f16, threads)),
    ];
    let mut rates: Vec<[Samples; WORKS.len()]> = vec![Default::default(); formats.len()];
    let mut peaks: Vec<Samples> = vec![Samples::default(); formats.len()];
    for _ in 0..rounds {
        for (format, (name, turn)) in formats.iter().enumerate() {
            let Turn { rates: measured, peak_bytes } = turn().with_context(|| (*name).to_owned())?;
            for (samples, rate) in rates[format].iter_mut().zip(measured) {
                samples.add(rate);
            }
            peaks[format].add(peak_bytes);
        }
    }

    println!("\n{:>16}  {}", "tokens/s", WORKS.map(|work| format!("{:>12}", work.name())).join(""));
    for ((name, _), rates) in formats.iter().zip(&rates) {
        let rates: Vec<String> = rates.iter().map(|samples| format!("{:>12.1}", samples.median())).collect();
        println!("{name:>16}  {}", rates.join(""));
    }
    let mut goals = Goals::default();
    let mut figures = Vec::new();
    for (at, work) in WORKS.into_iter().enumerate() {
        let of = |format: usize| rates[format][at].median();
        let best = of(2).max(of(3));
        for format in [0, 1] {
            let (name, ratio) = (formats[format].0, of(format) / best);
            figures.push(json!({"work": work.name(), "format": name, "tokens_s": of(format),
                "q8_0_tokens_s": of(2), "f16_tokens_s": of(3), "ratio_to_better": ratio,
                "ratio_to_f16": of(format) / of(3)}));
            if let Some(goal) = work.goal(isa.has_bf16()) {
                goals.at_least(&format!("{} of {name} to the better of the peer", work.name()), ratio, goal);
            } else {
                goals.at_least(&format!("{} of {name} to F16", work.name()), of(format) / of(3), 1.35);
            }
        }
    }
    let mut memory = Vec::new();
    for (format, folder) in [fbgemm, all_fp8].into_iter().enumerate() {
        let name = formats[format].0;
        let bytes = weight_bytes(folder, isa)?;
        let allowed = machine.memory / bytes;
        let share = rates[format][2].median() / allowed;
        goals.at_least(&format!("decode 1 of {name} to what memory allows ({allowed:.0}/s)"), share, 0.9);
        let peak = peaks[format].median() / peaks[2].median().min(peaks[3].median());
        goals.at_most(&format!("peak memory of {name} to the smaller of the peer"), peak, 1.1);
        memory.push(json!({"format": name, "weight_bytes": bytes, "allowed_tokens_s": allowed,
            "share_of_allowed": share, "peak_bytes": peaks[format].median(), "peak_ratio": peak}));
    }
    let load = load(fbgemm, on, machine.page_cache, rounds)?;
    goals.at_least("loading of fbgemm_fp8 to reads of the page cache", load.ratio, 0.9);
    let large = self::large(large, on)?;
    println!("{}", goals.line());
    let figures = json!({
        "threads": threads, "isa": isa.to_string(), "rounds": rounds,
        "memory_bytes_s": machine.memory, "page_cache_bytes_s": machine.page_cache,
        "multiply_adds_s": machine.multiply_adds,
        "smollm2": figures, "memory": memory,
        "load": {"bytes_s": load.rate, "ratio": load.ratio, "first_token_s": load.first_token},
        "large": large,
        "missed": goals.missed,
    });
    Ok((figures, goals.missed.is_empty()))
}

/// Says of each goal whether it is met.
#[derive(Debug, Default)]
struct Goals {
    met: usize,
    missed: Vec<String>,
}

impl Goals {
    fn at_least(&mut self, what: &str, ratio: f64, goal: f64) {
        self.say(what, ratio, goal, ratio >= goal, "at least");
    }

    fn at_most(&mut self, what: &str, ratio: f64, goal: f64) {
        self.say(what, ratio, goal, ratio <= goal, "at most");
    }

    fn say(&mut self, what: &str, ratio: f64, goal: f64, is_met: bool, bound: &str) {
        let verdict = if is_met { "met" } else { "MISSED" };
        println!("  {ratio:>6.2}  {what}: {bound} {goal}, {verdict}");
        if is_met {
            self.met += 1;
        } else {
            self.missed.push(format!("{what}: {ratio:.2} instead of {bound} {goal}"));
        }
    }

    fn line(&self) -> String {
        let Self { met, missed } = self;
        format!(
            "{met} goals met, {} missed{}",
            missed.len(),
            if missed.is_empty() { "" } else { ", see above" }
        )
    }
}

/// What a turn of ours prints.
#[derive(Debug, Deserialize)]
struct Own {
    rates: Vec<f64>,
    load_s: f64,
    first_token_s: f64,
    bytes_read: f64,
    peak_bytes: f64,
}

/// What a turn of ours computes with.
#[derive(Clone, Copy)]
struct On {
    threads: usize,
    isa: Isa,
}

fn own_turn(model: &Path, On { threads, isa }: On, works: &[Work]) -> Result<Own> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("engine-turn").arg("--model").arg(model).args(["--threads", &threads.to_string()]);
    command.args(["--isa", &isa.to_string()]);
    for work in works {
        match work {
            Work::Prefill(tokens) => command.args(["--prefill", &tokens.to_string()]),
            Work::Decode(sequences) => command.args(["--decode", &sequences.to_string()]),
        };
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("what a turn prints")
}

fn ours(model: &Path, on: On) -> Result<Turn> {
    let Own { rates, .. } = own_turn(model, on, &WORKS)?;
    // As the peer's is measured: a prompt of 512 and a few tokens.
    let Own { peak_bytes, .. } = own_turn(model, on, &[Work::Prefill(512)])?;
    let rates = rates.try_into().map_err(|_| anyhow::anyhow!("a turn of another number of works"))?;
    Ok(Turn { rates, peak_bytes })
}

fn weight_bytes(model: &Path, isa: Isa) -> Result<f64> {
    Ok(own_turn(model, On { threads: 1, isa }, &[])?.bytes_read)
}

struct Load {
    rate: f64,
    ratio: f64,
    first_token: f64,
}

/// How fast weights are read, packed and ready, with their files in the page cache.
fn load(model: &Path, on: On, page_cache: f64, rounds: usize) -> Result<Load> {
    let (mut rates, mut first) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        let own = own_turn(model, on, &[])?;
        rates.add(own.bytes_read / own.load_s);
        first.add(own.first_token_s);
    }
    let (rate, first_token) = (rates.median(), first.median());
    println!(
        "  loads {:.2} GB/s; from the start of the process to a first token {first_token:.2} s",
        rate / 1e9
    );
    Ok(Load { rate, ratio: rate / page_cache, first_token })
}

/// A model that no cache holds, alone.
fn large(model: &Path, on: On) -> Result<Value> {
    let works = [Work::Prefill(512), Work::Decode(1), Work::Decode(8)];
    let own = own_turn(model, on, &works)?;
    println!(
        "\nshape of Llama 3.2 1B, random weights in fbgemm_fp8: {:.2} GB, loaded in {:.1} s",
        own.bytes_read / 1e9,
        own.load_s
    );
    for (work, rate) in works.into_iter().zip(&own.rates) {
        println!("  {:>12}  {rate:>8.1} tokens/s", work.name());
    }
    let rates: serde_json::Map<String, Value> =
        works.iter().zip(&own.rates).map(|(work, rate)| (work.name(), json!(rate))).collect();
    Ok(
        json!({"weight_bytes": own.bytes_read, "load_s": own.load_s, "tokens_s": rates, "peak_bytes": own.peak_bytes}),
    )
}
