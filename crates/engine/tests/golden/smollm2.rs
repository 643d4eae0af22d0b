//! SmolLM2-135M-Instruct, where `cargo xtask models` has made it; else these tests say that they are skipped.

use std::path::PathBuf;

use herd_model::{Dtype, Parallelism};

use crate::perplexity::perplexity;
use crate::reference::{Golden, argmax, fixture};
use crate::runner::Runner;

/// The model's folder, or a printed reason.
fn model(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("HERD_MODELS").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        Some(cache.or_else(home)?.join("herd/models"))
    });
    let folder = folder?.join(name);
    if folder.join("config.json").exists() {
        return Some(folder);
    }
    println!("skipped: no {}; `cargo xtask models` makes it", folder.display());
    None
}

#[test]
fn bf16_agrees_along_the_golden_path() {
    agreement("smollm2-135m-bf16", "smollm2/golden-smollm2-135m.json", 0.98);
}

#[test]
fn fbgemm_fp8_agrees_along_the_golden_path() {
    agreement("smollm2-135m-fbgemm-fp8", "smollm2/golden-smollm2-135m-fbgemm-fp8.json", 0.9);
}

/// The share of steps in which the most likely token is the golden's, fed along the golden's tokens. Two implementations of
/// FP8 agree no better than that: one rounding that falls the other way grows over 30 narrow layers.
fn agreement(name: &str, golden: &str, least: f64) {
    let Some(folder) = model(name) else { return };
    let golden = Golden::open(golden);
    for (tensor, pipeline) in [(1, 1), (3, 1), (1, 2), (1, 3)] {
        let mut runner = Runner::load(&folder, Parallelism { tensor, pipeline }, Dtype::F32, 16);
        let (mut agreed, mut steps) = (0_u32, 0_u32);
        for case in &golden.cases {
            let tokens = [&case.prompt[..], &case.greedy[..case.greedy.len() - 1]].concat();
            let rows = runner.logits_of_all(&tokens, 0);
            for (row, token) in rows[case.prompt.len() - 1..].iter().zip(&case.greedy) {
                agreed += u32::from(argmax(row) == *token);
                steps += 1;
            }
        }
        let share = f64::from(agreed) / f64::from(steps);
        println!("{name} at tensor {tensor}, pipeline {pipeline}: {agreed} of {steps} steps agree");
        assert!(
            share >= least,
            "{name} at tensor {tensor}, pipeline {pipeline}: {agreed} of {steps} steps agree"
        );
    }
}

#[test]
fn fbgemm_fp8_has_the_goldens_perplexity() {
    if std::env::var_os("HERD_FULL").is_none() {
        println!("skipped: takes minutes; HERD_FULL=1 runs it");
        return;
    }
    let Some(folder) = model("smollm2-135m-fbgemm-fp8") else { return };
    let golden = Golden::open("smollm2/golden-smollm2-135m-fbgemm-fp8.json").perplexity.unwrap().value;
    let tokens: Vec<u32> =
        serde_json::from_slice(&std::fs::read(fixture("smollm2/perplexity-ids.json")).unwrap()).unwrap();
    let own = perplexity(&mut Runner::load(&folder, Parallelism::tensor(3), Dtype::F32, 16), &tokens, 1024);
    println!("smollm2-135m-fbgemm-fp8 at tensor 3: {own:.4}, the reference's is {golden:.4}");
    assert!((own / golden - 1.0).abs() <= 0.02, "{own} is not {golden}");
}
