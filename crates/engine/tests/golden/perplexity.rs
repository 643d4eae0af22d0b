//! Perplexity of tiny over 8 windows of 512 tokens.

use herd_model::{Dtype, Parallelism};

use crate::reference::{Golden, fixture, logprobs};
use crate::runner::Runner;

#[test]
fn tiny() {
    let tokens: Vec<u32> =
        serde_json::from_slice(&std::fs::read(fixture("tiny-llama31/val_tokens.json")).unwrap()).unwrap();
    for (quantization, dtype, tolerance) in [
        ("bf16", Dtype::F32, 0.001),
        ("bf16", Dtype::Bf16, 0.005),
        ("fbgemm-fp8", Dtype::F32, 0.001),
        ("fbgemm-fp8", Dtype::Bf16, 0.005),
        ("compressed-tensors-fp8", Dtype::F32, 0.02),
        ("compressed-tensors-fp8", Dtype::Bf16, 0.02),
    ] {
        let golden =
            Golden::open(&format!("tiny-llama31/golden-{quantization}.json")).perplexity.unwrap().value;
        let folder = fixture(&format!("tiny-llama31/tiny-llama31-{quantization}"));
        let own = perplexity(&mut Runner::load(&folder, Parallelism::tensor(2), dtype, 8), &tokens, 512);
        let off = (own / golden - 1.0).abs();
        println!("{quantization} in {dtype}: {own:.4}, the reference's is {golden:.4}");
        assert!(off <= tolerance, "{quantization} in {dtype}: {own} is {off} from {golden}");
    }
}

/// Each window starts anew at position 0 and predicts the token after each of its tokens.
pub(crate) fn perplexity(runner: &mut Runner, tokens: &[u32], window: usize) -> f64 {
    let mut sum = 0.0;
    let mut count = 0;
    for from in (0..tokens.len() - 1).step_by(window) {
        let to = (tokens.len() - 1).min(from + window);
        let rows = runner.logits_of_all(&tokens[from..to], 0);
        for (row, next) in rows.iter().zip(&tokens[from + 1..=to]) {
            sum -= logprobs(row)[*next as usize];
            count += 1;
        }
    }
    (sum / f64::from(count)).exp()
}
