//! The reference's prompts and what it made of them.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;

/// A path in the project's reference data.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

#[derive(Deserialize)]
pub(crate) struct Golden {
    pub(crate) cases: Vec<Case>,
    pub(crate) perplexity: Option<Perplexity>,
}

#[derive(Deserialize)]
pub(crate) struct Perplexity {
    pub(crate) value: f64,
}

#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) id: usize,
    pub(crate) prompt: Vec<u32>,
    #[serde(default)]
    pub(crate) prompt_logprobs_first64: Vec<f64>,
    pub(crate) greedy: Vec<u32>,
    #[serde(default)]
    pub(crate) greedy_logprobs: Vec<f64>,
    /// Of the two largest logits, by step.
    #[serde(default)]
    pub(crate) top2_gaps: Vec<f64>,
    #[serde(rename = "tokens_before_a_gap_below_0.02")]
    pub(crate) before_small_gap: Option<usize>,
    #[serde(rename = "tokens_before_a_gap_below_0.5")]
    pub(crate) before_large_gap: Option<usize>,
}

impl Golden {
    pub(crate) fn open(path: &str) -> Self {
        serde_json::from_slice(&std::fs::read(fixture(path)).unwrap()).unwrap()
    }
}

/// Logits of a golden, by case: position and row.
pub(crate) fn logits(path: &str, case: &Case) -> Vec<(usize, Vec<f32>)> {
    let bytes = std::fs::read(fixture(path)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut found = Vec::new();
    for name in tensors.names() {
        let Some(place) = name.strip_prefix(&format!("{}/logits_", case.id)) else { continue };
        let position = match place.strip_prefix("at_") {
            Some(position) => position.parse().unwrap(),
            None => case.prompt.len() - 1,
        };
        let data = tensors.tensor(name).unwrap().data().to_vec();
        found.push((position, data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()));
    }
    assert!(found.len() >= 3, "{path} has {} rows of logits for case {}", found.len(), case.id);
    found
}

/// `ln` of the probability of each token.
pub(crate) fn logprobs(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f64::NEG_INFINITY, |largest, &logit| largest.max(f64::from(logit)));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - largest - sum.ln()).collect()
}

/// The most likely token; of equals the first.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > largest {
            (best, largest) = (token, logit);
        }
    }
    best as u32
}
