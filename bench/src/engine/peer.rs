//! A turn of llama.cpp: its own benches, which read and write the same numbers of tokens as ours.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{GENERATED, PROMPT, Turn, WORKS, Work};

/// How often a running program is looked at.
const LOOK: Duration = Duration::from_millis(20);

pub(super) fn turn(programs: &Path, model: &Path, threads: usize) -> Result<Turn> {
    let mut turn = Turn::default();
    let threads = threads.to_string();
    let bench = |arguments: &[&str]| {
        let mut command = Command::new(programs.join("llama-bench"));
        command.arg("-m").arg(model).args(["-t", &threads, "-r", "1", "-o", "jsonl"]).args(arguments);
        output(command)
    };
    let (prefills, _) = bench(&["-p", "512,2048", "-n", "0"])?;
    let mut command = Command::new(programs.join("llama-batched-bench"));
    command
        .arg("-m")
        .arg(model)
        .args(["-t", &threads, "-tb", &threads, "-c", "10240", "-b", "2048", "-ub", "512"]);
    command.args(["-npp", &PROMPT.to_string(), "-ntg", &GENERATED.to_string(), "-npl", "1,8,32"]);
    command.args(["--output-format", "jsonl"]);
    let (decodes, _) = output(command)?;
    for (rate, work) in turn.rates.iter_mut().zip(WORKS) {
        let (lines, key, count, figure) = match work {
            Work::Prefill(tokens) => (&prefills, "n_prompt", tokens, "avg_ts"),
            Work::Decode(sequences) => (&decodes, "pl", sequences, "speed_tg"),
        };
        let line = lines.iter().find(|line| line[key].as_u64() == Some(count as u64));
        *rate =
            line.and_then(|line| line[figure].as_f64()).with_context(|| format!("no figure of {work:?}"))?;
    }
    turn.peak_bytes = bench(&["-p", "512", "-n", "32"])?.1;
    Ok(turn)
}

/// The JSON lines that a program prints, and the peak of its memory.
fn output(mut command: Command) -> Result<(Vec<Value>, f64)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let stdout = child.stdout.take().context("what it prints")?;
    let reader = std::thread::spawn(move || std::io::read_to_string(stdout));
    let id = child.id().to_string();
    let mut peak: f64 = 0.0;
    let status = loop {
        peak = peak.max(peak_bytes(&id).unwrap_or(0.0));
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(LOOK),
        }
    };
    ensure!(status.success(), "{command:?} ended with {status}");
    let text = reader.join().map_err(|_| anyhow::anyhow!("reading {command:?}"))??;
    let lines = text.lines().filter(|line| line.starts_with('{')).map(serde_json::from_str);
    Ok((lines.collect::<Result<_, _>>()?, peak))
}

/// The most memory that a process has had.
pub(super) fn peak_bytes(process: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok().map(|kib: f64| kib * 1024.0)
}
