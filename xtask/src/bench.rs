//! `cargo xtask bench`: figures beside those of a peer in the same run. Never a test.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Subcommand, ValueEnum};

use crate::install::{self, Down};
use crate::llama_cpp::{self, Instructions};
use crate::lock::Lock;
use crate::paths::Paths;
use crate::{binaries, cluster, machine, models, progress};

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum BenchCommand {
    /// What a fleet costs: the gateway a token, a KV transfer a byte, a gang of three processes a step, more load the time to follow it
    Fleet {
        /// What is measured, all unless given; figures of other parts stay as they are
        parts: Vec<Part>,
        /// For scaling, use and leave this cluster; without it, one is made and removed
        #[arg(long)]
        name: Option<String>,
    },
    /// The engine against llama.cpp, which is built once (cmake, a C++ compiler; 6 minutes on two cores): prefill, decode,
    /// memory, loading; ends with the goals that are met, and fails when one is not
    Engine {
        /// Turns of each, of which the median counts
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Both by AVX2 alone, whatever the CPU has
        #[arg(long)]
        avx2: bool,
    },
}

/// What can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    Gateway,
    Kv,
    Gang,
    /// Needs root: it runs on a cluster.
    Scaling,
}

/// What the cluster's name begins with, unless one is given.
const WORD: &str = "bm";

/// Runs it in the foreground. Parts that compute alone have the machine to themselves, before there is a cluster.
pub(crate) fn run(paths: &Paths, bench: BenchCommand) -> Result<ExitCode> {
    let (parts, name) = match bench {
        BenchCommand::Fleet { parts, name } => (parts, name),
        BenchCommand::Engine { rounds, avx2 } => return engine(paths, rounds, avx2),
    };
    let parts = if parts.is_empty() { Part::value_variants().to_vec() } else { parts };
    let (clusters, alone): (Vec<Part>, Vec<Part>) =
        parts.into_iter().partition(|part| *part == Part::Scaling);
    let program = progress::step("programs", |activity| binaries::bench(paths, activity))?;
    models::make(paths)?;
    if !alone.is_empty() {
        measure(fleet(paths, &program, &alone))?;
    }
    if clusters.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    machine::prepare()?;
    let own = name.is_none();
    let name = name.unwrap_or_else(|| cluster::of_clone(paths, WORD));
    let lock = Lock::of_cluster(paths, &name, "bench")?;
    let _down = own.then(|| Down { paths, name: &name });
    let installed = install::install(paths, &name, &lock)?;
    let mut command = fleet(paths, &program, &clusters);
    command.arg("--kubectl").arg(installed.kubectl.program());
    measure(command)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes what the engine's bench needs, and runs it.
fn engine(paths: &Paths, rounds: usize, avx2: bool) -> Result<ExitCode> {
    let program = progress::step("programs", |activity| binaries::bench(paths, activity))?;
    models::make(paths)?;
    let (instructions, result) =
        if avx2 { (Instructions::Avx2, "engine-avx2.json") } else { (Instructions::Native, "engine.json") };
    let peer = progress::step("llama.cpp", |activity| llama_cpp::build(paths, instructions, activity))?;
    let herd = binaries::herd(paths)?;
    let folder = paths.cache.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let bf16 = paths.models.join(models::BF16);
    let all_fp8 = folder.join("smollm2-135m-all-fp8");
    if !all_fp8.exists() {
        succeed(
            Command::new(&herd)
                .args(["models", "quantize", "--to", "compressed-tensors", "--no-calibration"])
                .arg(&bf16)
                .arg("--out")
                .arg(&all_fp8),
        )?;
    }
    let large = folder.join("llama-3.2-1b-random-fbgemm-fp8");
    if !large.exists() {
        let random = folder.join("llama-3.2-1b-random");
        let config = paths.root.join("fixtures/model-sizes/llama-3.2-1b-instruct/config.json");
        succeed(
            Command::new(&program).args(["random-model", "--config"]).arg(config).arg("--out").arg(&random),
        )?;
        succeed(
            Command::new(&herd)
                .args(["models", "quantize", "--to", "fbgemm_fp8", "--no-calibration"])
                .arg(&random)
                .arg("--out")
                .arg(&large),
        )?;
        fs::remove_dir_all(&random).with_context(|| format!("remove {}", random.display()))?;
    }
    let [q8_0, f16] = peer.models(paths)?;
    let status = Command::new(&program)
        .arg("engine")
        .args(["--rounds", &rounds.to_string()])
        .args(avx2.then_some(["--isa", "avx2"]).into_iter().flatten())
        .arg("--fbgemm")
        .arg(paths.models.join(models::FP8))
        .arg("--all-fp8")
        .arg(all_fp8)
        .arg("--large")
        .arg(large)
        .arg("--peer")
        .arg(peer.programs())
        .arg("--q8-0")
        .arg(q8_0)
        .arg("--f16")
        .arg(f16)
        .arg("--out")
        .arg(paths.root.join("bench/results").join(result))
        .status()
        .context("failed to run herd-bench")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("failed to run {command:?}"))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

fn fleet(paths: &Paths, program: &Path, parts: &[Part]) -> Command {
    let mut command = Command::new(program);
    command
        .arg("fleet")
        .arg("--model")
        .arg(paths.models.join(models::FP8))
        .arg("--tokenizer")
        .arg(paths.root.join("fixtures/tiny-llama31/tiny-llama31-bf16"))
        .arg("--out")
        .arg(paths.root.join("bench/results/fleet.json"));
    for part in parts.iter().filter_map(ValueEnum::to_possible_value) {
        command.arg(part.get_name());
    }
    command
}

fn measure(mut command: Command) -> Result<()> {
    let status = command.status().context("failed to run herd-bench")?;
    ensure!(status.success(), "herd-bench ended with {status}");
    Ok(())
}
