//! Which linears are stored in FP8 (e4m3), and how their inputs are quantized.

use regex::{Regex, RegexBuilder};

/// Of a compiled pattern; none of a real configuration comes near.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// FP8 linears of a model. Two layouts of checkpoints are known:
/// - `fbgemm_fp8`, Meta's: a scale an output, inputs quantized per token while running, their magnitude bounded. Source:
///   transformers' `FbgemmFp8Config` and the checkpoint `meta-llama/Llama-3.1-405B-Instruct-FP8`.
/// - `compressed-tensors` with format `float-quantized`: scales an output or one a weight; inputs quantized per token without
///   a bound, or by a scale that is stored. Source: the configuration of the Python package `compressed-tensors`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8 {
    /// Of the weights.
    pub weight_scales: WeightScales,
    /// Of what they are multiplied with.
    pub input_scales: InputScales,
    /// Modules that are not converted.
    pub kept: Kept,
}

/// How many scales a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightScales {
    /// One a row.
    PerOutput,
    /// One.
    PerTensor,
}

/// Where the scale of a linear's inputs comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InputScales {
    /// From the largest magnitude of each token, while running.
    PerToken {
        /// What is above it is clipped. Infinite: nothing is.
        bound: f32,
    },
    /// From the checkpoint, one a linear: `.input_scale`.
    Stored,
}

/// Names of modules that stay as they are.
#[derive(Clone, Debug, PartialEq)]
pub enum Kept {
    /// A name covers the modules under it, and is a run of whole components of theirs.
    Under(Vec<String>),
    /// Whole names, and patterns.
    Named(Vec<String>, Vec<Pattern>),
}

/// A regular expression that a name has to begin with.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

impl Pattern {
    /// As Python's `re.match` takes it, as far as linear time goes.
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        let anchored = format!("^(?:{text})");
        let built = RegexBuilder::new(&anchored).size_limit(MAX_PATTERN_BYTES).build();
        built.map(Self).map_err(|error| error.to_string())
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Fp8 {
    /// Whether a linear of a decoder layer (`model.layers.1.mlp.up_proj`) is in FP8.
    pub fn converts(&self, module: &str) -> bool {
        !match &self.kept {
            Kept::Under(names) => names.iter().any(|kept| covers(kept, module)),
            Kept::Named(names, patterns) => {
                names.iter().any(|name| name == module)
                    || patterns.iter().any(|pattern| pattern.0.is_match(module))
            }
        }
    }

    /// The bound of [`InputScales::PerToken`]; infinite where there is none.
    pub fn input_bound(&self) -> f32 {
        match self.input_scales {
            InputScales::PerToken { bound } => bound,
            InputScales::Stored => f32::INFINITY,
        }
    }
}

/// Whether `kept` is a run of whole components of `module`.
fn covers(kept: &str, module: &str) -> bool {
    !kept.is_empty() && format!(".{module}.").contains(&format!(".{kept}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(kept: Kept) -> Fp8 {
        let input_scales = InputScales::PerToken { bound: 1200.0 };
        Fp8 { weight_scales: WeightScales::PerOutput, input_scales, kept }
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn names_cover_whole_components() {
        let names = owned(&["model.layers.1", "model.layers.3.mlp.up_proj", "o_proj"]);
        let quantization = kept(Kept::Under(names));
        assert!(!quantization.converts("model.layers.1.mlp.up_proj"));
        assert!(!quantization.converts("model.layers.3.mlp.up_proj"));
        assert!(!quantization.converts("model.layers.7.self_attn.o_proj"));
        assert!(quantization.converts("model.layers.10.mlp.up_proj"));
        assert!(quantization.converts("model.layers.3.mlp.gate_proj"));
        assert!(kept(Kept::Under(owned(&[""]))).converts("model.layers.3.mlp.gate_proj"));
    }

    #[test]
    fn ignored_are_whole_names_and_what_patterns_begin() {
        let patterns =
            [r".*\.self_attn\.", "model.layers.2.mlp.down"].map(|text| Pattern::new(text).unwrap());
        let names = owned(&["lm_head", "model.layers.1.mlp.up_proj", "model.layers.3"]);
        let quantization = kept(Kept::Named(names, patterns.into()));
        assert!(!quantization.converts("model.layers.1.mlp.up_proj"));
        assert!(!quantization.converts("model.layers.7.self_attn.o_proj"));
        assert!(!quantization.converts("model.layers.2.mlp.down_proj"));
        assert!(quantization.converts("model.layers.12.mlp.down_proj"));
        // A whole name covers nothing under it.
        assert!(quantization.converts("model.layers.3.mlp.gate_proj"));
        assert!(Pattern::new("(").is_err());
        assert!(Pattern::new("(?:a{1000}){1000}").is_err());
    }
}
