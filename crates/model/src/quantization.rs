//! Which linears are stored in FP8, and how their inputs are quantized.

/// Meta's FP8 layout: weights in e4m3 with one f32 scale a row, inputs quantized per token while running.
/// Source: transformers' `FbgemmFp8Config` and the checkpoint `meta-llama/Llama-3.1-405B-Instruct-FP8`.
#[derive(Clone, Debug, PartialEq)]
pub struct FbgemmFp8 {
    /// Upper bound on a token's largest magnitude; what is above it is clipped.
    pub activation_scale_ub: f32,
    /// Module names that stay in bf16. A name covers the modules under it.
    pub modules_to_not_convert: Vec<String>,
}

impl FbgemmFp8 {
    /// Whether a linear of a decoder layer (`model.layers.1.mlp.up_proj`) is in FP8.
    pub fn converts(&self, module: &str) -> bool {
        !self.modules_to_not_convert.iter().any(|kept| covers(kept, module))
    }
}

/// Whether `kept` is a run of whole components of `module`.
fn covers(kept: &str, module: &str) -> bool {
    !kept.is_empty() && format!(".{module}.").contains(&format!(".{kept}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(names: &[&str]) -> FbgemmFp8 {
        FbgemmFp8 {
            activation_scale_ub: 1200.0,
            modules_to_not_convert: names.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn names_cover_whole_components() {
        let quantization = kept(&["model.layers.1", "model.layers.3.mlp.up_proj", "o_proj"]);
        assert!(!quantization.converts("model.layers.1.mlp.up_proj"));
        assert!(!quantization.converts("model.layers.3.mlp.up_proj"));
        assert!(!quantization.converts("model.layers.7.self_attn.o_proj"));
        assert!(quantization.converts("model.layers.10.mlp.up_proj"));
        assert!(quantization.converts("model.layers.3.mlp.gate_proj"));
        assert!(kept(&[""]).converts("model.layers.3.mlp.gate_proj"));
    }
}
