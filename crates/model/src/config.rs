//! `config.json` of a checkpoint, checked.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::quantization::{Fp8, InputScales, Kept, Pattern, WeightScales};
use crate::rope::{Llama3Scaling, Rope};

/// A model of the Llama architecture. Every value is within bounds and fits the others.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Lanes of the residual stream.
    pub hidden_size: usize,
    /// Lanes of the feed-forward network.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Lanes of a head; even.
    pub head_dim: usize,
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Added to the mean square before its root.
    pub rms_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Tokens of prompt and completion together.
    pub context_length: usize,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
    /// Begin of sequence.
    pub bos_id: Option<u32>,
    /// Any of these ends a sequence.
    pub eos_ids: Vec<u32>,
    /// None: every linear as stored, in bf16, f16 or f32.
    pub quantization: Option<Fp8>,
}

/// A configuration that cannot be served, with the field at fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, a field missing, or of another type.
    #[error("{file}: {source}")]
    Json {
        /// `config.json` or `generation_config.json`.
        file: &'static str,
        /// Names the field and the place.
        source: serde_json::Error,
    },
    /// A value that makes no model, or one that is not served.
    #[error("config.json: {field} {problem}")]
    Field {
        /// As written in the file.
        field: &'static str,
        /// What it is and what it may be.
        problem: String,
    },
}

fn field<T>(field: &'static str, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Field { field, problem: problem.into() })
}

#[derive(Deserialize)]
struct ConfigFile {
    model_type: String,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: u64,
    rms_norm_eps: f64,
    max_position_embeddings: u64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeFile>,
    // Where transformers 5 writes theta and scaling.
    rope_parameters: Option<RopeFile>,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
    quantization_config: Option<QuantizationFile>,
}

#[derive(Deserialize)]
struct RopeFile {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<u64>,
}

#[derive(Deserialize)]
struct QuantizationFile {
    quant_method: String,
    activation_scale_ub: Option<f64>,
    modules_to_not_convert: Option<Vec<String>>,
    format: Option<String>,
    config_groups: Option<BTreeMap<String, GroupFile>>,
    ignore: Option<Vec<String>>,
}

/// Of `compressed-tensors`: linears that are quantized alike.
#[derive(Deserialize)]
struct GroupFile {
    targets: Vec<String>,
    weights: Option<NumbersFile>,
    input_activations: Option<NumbersFile>,
}

#[derive(Deserialize)]
struct NumbersFile {
    num_bits: u32,
    #[serde(rename = "type")]
    kind: String,
    strategy: String,
    #[serde(default = "yes")]
    symmetric: bool,
    #[serde(default)]
    dynamic: serde_json::Value,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct GenerationFile {
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl ModelConfig {
    /// Reads `config.json` and, where there is one, `generation_config.json`, whose begin and end of sequence go first.
    pub fn from_json(config: &[u8], generation_config: Option<&[u8]>) -> Result<Self, ConfigError> {
        let file: ConfigFile = serde_json::from_slice(config)
            .map_err(|source| ConfigError::Json { file: "config.json", source })?;
        let generation: Option<GenerationFile> = generation_config
            .map(serde_json::from_slice)
            .transpose()
            .map_err(|source| ConfigError::Json { file: "generation_config.json", source })?;
        build(file, generation)
    }

    /// Bytes of keys and values of one token over all layers and KV heads, at `bytes` a number.
    pub fn kv_bytes_per_token(&self, bytes: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * bytes
    }
}

fn build(file: ConfigFile, generation: Option<GenerationFile>) -> Result<ModelConfig, ConfigError> {
    let ConfigFile {
        model_type,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size,
        rms_norm_eps,
        max_position_embeddings,
        rope_theta,
        rope_scaling,
        rope_parameters,
        tie_word_embeddings,
        hidden_act,
        attention_bias,
        mlp_bias,
        bos_token_id,
        eos_token_id,
        quantization_config,
    } = file;
    if model_type != "llama" {
        return field("model_type", format!("is {model_type:?}; only \"llama\" is served"));
    }
    if let Some(act) = hidden_act.filter(|act| act != "silu") {
        return field("hidden_act", format!("is {act:?}; only \"silu\" is served"));
    }
    if attention_bias {
        return field("attention_bias", "is true; linears with a bias are not served");
    }
    if mlp_bias {
        return field("mlp_bias", "is true; linears with a bias are not served");
    }
    let hidden_size = size("hidden_size", hidden_size, 1 << 20)?;
    let intermediate_size = size("intermediate_size", intermediate_size, 1 << 22)?;
    let layers = size("num_hidden_layers", num_hidden_layers, 4096)?;
    let heads = size("num_attention_heads", num_attention_heads, 4096)?;
    let kv_heads = size("num_key_value_heads", num_key_value_heads.unwrap_or(heads as u64), 4096)?;
    if !heads.is_multiple_of(kv_heads) {
        return field(
            "num_key_value_heads",
            format!("is {kv_heads}; it has to divide num_attention_heads, {heads}"),
        );
    }
    if head_dim.is_none() && !hidden_size.is_multiple_of(heads) {
        return field(
            "hidden_size",
            format!(
                "is {hidden_size}; without head_dim it has to be a multiple of num_attention_heads, {heads}"
            ),
        );
    }
    let head_dim = size("head_dim", head_dim.unwrap_or((hidden_size / heads) as u64), 1024)?;
    if head_dim % 2 == 1 {
        return field("head_dim", format!("is {head_dim}; it has to be even"));
    }
    let vocab_size = size("vocab_size", vocab_size, 1 << 24)?;
    let context_length = size("max_position_embeddings", max_position_embeddings, 1 << 24)?;
    if !(0.0..1.0).contains(&rms_norm_eps) {
        return field("rms_norm_eps", format!("is {rms_norm_eps}; it has to be at least 0 and below 1"));
    }
    let (generation_bos, generation_eos) = generation
        .map_or((None, None), |GenerationFile { bos_token_id, eos_token_id }| (bos_token_id, eos_token_id));
    let bos_id = generation_bos.or(bos_token_id);
    let eos_ids = generation_eos.or(eos_token_id).map(Ids::into_vec).unwrap_or_default();
    for (name, id) in
        bos_id.iter().map(|id| ("bos_token_id", id)).chain(eos_ids.iter().map(|id| ("eos_token_id", id)))
    {
        if *id as usize >= vocab_size {
            return field(name, format!("is {id}; it has to be below vocab_size, {vocab_size}"));
        }
    }
    Ok(ModelConfig {
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size,
        rms_eps: rms_norm_eps as f32,
        rope: rope(rope_theta, rope_parameters.or(rope_scaling))?,
        context_length,
        tied_embeddings: tie_word_embeddings,
        bos_id,
        eos_ids,
        quantization: quantization_config.map(quantization).transpose()?,
    })
}

fn size(name: &'static str, value: u64, most: usize) -> Result<usize, ConfigError> {
    match usize::try_from(value) {
        Ok(value) if (1..=most).contains(&value) => Ok(value),
        _ => field(name, format!("is {value}; it has to be 1 to {most}")),
    }
}

fn rope(theta: Option<f64>, file: Option<RopeFile>) -> Result<Rope, ConfigError> {
    let theta = file.as_ref().and_then(|file| file.rope_theta).or(theta).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 1.0) {
        return field("rope_theta", format!("is {theta}; it has to be a number above 1"));
    }
    let Some(file) = file else { return Ok(Rope { theta, scaling: None }) };
    let RopeFile {
        rope_type,
        rope_theta: _,
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    } = file;
    match rope_type.as_deref() {
        None | Some("default") => return Ok(Rope { theta, scaling: None }),
        Some("llama3") => {}
        Some(other) => {
            return field(
                "rope_scaling.rope_type",
                format!("is {other:?}; only \"default\" and \"llama3\" are served"),
            );
        }
    }
    let factor = positive("rope_scaling.factor", factor)?;
    let low_freq_factor = positive("rope_scaling.low_freq_factor", low_freq_factor)?;
    let high_freq_factor = positive("rope_scaling.high_freq_factor", high_freq_factor)?;
    if high_freq_factor <= low_freq_factor {
        return field(
            "rope_scaling.high_freq_factor",
            format!("is {high_freq_factor}; it has to be above low_freq_factor, {low_freq_factor}"),
        );
    }
    let name = "rope_scaling.original_max_position_embeddings";
    let original_context = size(name, original_max_position_embeddings.unwrap_or(0), 1 << 24)?;
    Ok(Rope {
        theta,
        scaling: Some(Llama3Scaling { factor, low_freq_factor, high_freq_factor, original_context }),
    })
}

fn positive(name: &'static str, value: Option<f64>) -> Result<f64, ConfigError> {
    match value {
        Some(value) if value.is_finite() && value > 0.0 => Ok(value),
        Some(value) => field(name, format!("is {value}; it has to be a number above 0")),
        None => field(name, "is missing; rope_type \"llama3\" needs it"),
    }
}

fn quantization(file: QuantizationFile) -> Result<Fp8, ConfigError> {
    match file.quant_method.as_str() {
        "fbgemm_fp8" => fbgemm_fp8(file),
        "compressed-tensors" => compressed_tensors(file),
        method => field(
            "quantization_config.quant_method",
            format!("is {method:?}; only \"fbgemm_fp8\" and \"compressed-tensors\" are served"),
        ),
    }
}

fn fbgemm_fp8(file: QuantizationFile) -> Result<Fp8, ConfigError> {
    let bound = file.activation_scale_ub.unwrap_or(1200.0) as f32;
    if !(bound.is_finite() && bound > 0.0) {
        return field(
            "quantization_config.activation_scale_ub",
            format!("is {bound}; it has to be a number above 0"),
        );
    }
    Ok(Fp8 {
        weight_scales: WeightScales::PerOutput,
        input_scales: InputScales::PerToken { bound },
        kept: Kept::Under(file.modules_to_not_convert.unwrap_or_default()),
    })
}

fn compressed_tensors(file: QuantizationFile) -> Result<Fp8, ConfigError> {
    const GROUPS: &str = "quantization_config.config_groups";
    if let Some(format) = file.format.filter(|format| format != "float-quantized") {
        return field(
            "quantization_config.format",
            format!("is {format:?}; only \"float-quantized\" is served"),
        );
    }
    let mut groups = file.config_groups.unwrap_or_default().into_values();
    let (Some(GroupFile { targets, weights, input_activations }), None) = (groups.next(), groups.next())
    else {
        return field(GROUPS, "are not one group, and one for all linears is served");
    };
    if targets != ["Linear"] {
        return field(GROUPS, format!("target {targets:?}; only [\"Linear\"] is served"));
    }
    let (Some(weights), Some(inputs)) = (weights, input_activations) else {
        return field(GROUPS, "quantize not both weights and input_activations; only both are served");
    };
    let is_fp8 = |NumbersFile { num_bits, kind, symmetric, .. }: &NumbersFile| {
        *num_bits == 8 && kind == "float" && *symmetric
    };
    if !is_fp8(&weights) || !is_fp8(&inputs) {
        return field(GROUPS, "have other numbers than symmetric floats of 8 bits, which alone are served");
    }
    let weight_scales = match weights.strategy.as_str() {
        "channel" => WeightScales::PerOutput,
        "tensor" => WeightScales::PerTensor,
        other => {
            let problem = format!("scale weights by {other:?}; only \"channel\" and \"tensor\" are served");
            return field(GROUPS, problem);
        }
    };
    let is_dynamic = inputs.dynamic == true;
    let input_scales = match (inputs.strategy.as_str(), is_dynamic) {
        ("token", true) => InputScales::PerToken { bound: f32::INFINITY },
        ("tensor", false) => InputScales::Stored,
        (other, _) => {
            let how = if is_dynamic { "dynamically" } else { "by stored scales" };
            return field(
                GROUPS,
                format!(
                    "scale input_activations by {other:?}, {how}; served are \"token\" dynamically and \"tensor\" by stored scales"
                ),
            );
        }
    };
    let (mut names, mut patterns) = (Vec::new(), Vec::new());
    for ignored in file.ignore.unwrap_or_default() {
        match ignored.strip_prefix("re:").map(Pattern::new) {
            None => names.push(ignored),
            Some(Ok(pattern)) => patterns.push(pattern),
            Some(Err(error)) => {
                return field("quantization_config.ignore", format!("has {ignored:?}: {error}"));
            }
        }
    }
    Ok(Fp8 { weight_scales, input_scales, kept: Kept::Named(names, patterns) })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn config_json() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192
            }
        })
    }

    pub(crate) fn parse(json: &Value) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_json(json.to_string().as_bytes(), None)
    }

    pub(crate) fn any_config() -> impl Strategy<Value = ModelConfig> {
        let kv_and_group = (1_u64..=16, 1_u64..=16);
        (kv_and_group, 1_u64..=8, 1_u64..=600, 1_u64..=3000).prop_map(|((kv, group), half, ffn, vocab)| {
            let mut json = config_json();
            json["num_key_value_heads"] = kv.into();
            json["num_attention_heads"] = (kv * group).into();
            json["head_dim"] = (2 * half).into();
            json["intermediate_size"] = ffn.into();
            json["vocab_size"] = vocab.into();
            json["bos_token_id"] = Value::Null;
            json["eos_token_id"] = Value::Null;
            parse(&json).unwrap()
        })
    }

    #[test]
    fn reads_llama_3_1_8b() {
        let config = parse(&config_json()).unwrap();
        assert_eq!(config.head_dim, 128);
        assert_eq!(config.eos_ids, [128_001, 128_008, 128_009]);
        assert_eq!(config.rope.scaling.as_ref().unwrap().original_context, 8192);
        assert_eq!(config.kv_bytes_per_token(2), 131_072);
        assert_eq!(config.quantization, None);
        assert!(!config.tied_embeddings);
    }

    #[test]
    fn generation_config_goes_first() {
        let config = config_json().to_string();
        let generation = br#"{"eos_token_id": 7, "temperature": 0.6}"#;
        let config = ModelConfig::from_json(config.as_bytes(), Some(generation)).unwrap();
        assert_eq!((config.bos_id, config.eos_ids), (Some(128_000), vec![7]));
    }

    #[test]
    fn reads_rope_parameters_of_transformers_5() {
        let mut json = config_json();
        let mut rope = json["rope_scaling"].take();
        rope["rope_theta"] = json["rope_theta"].take();
        json["rope_parameters"] = rope;
        assert_eq!(parse(&json).unwrap(), parse(&config_json()).unwrap());
    }

    #[test]
    fn reads_fbgemm_fp8() {
        let mut json = config_json();
        json["quantization_config"] = json!({
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 3.0,
            "modules_to_not_convert": ["model.layers.0.mlp.up_proj"]
        });
        let quantization = parse(&json).unwrap().quantization.unwrap();
        assert!((2.999..=3.001).contains(&quantization.input_bound()));
        assert!(!quantization.converts("model.layers.0.mlp.up_proj"));
    }

    fn compressed(change: impl FnOnce(&mut Value)) -> Result<Fp8, String> {
        let mut json = config_json();
        let numbers = |strategy: &str, dynamic: bool| json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "dynamic": dynamic});
        let mut quantization = json!({
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head", r"re:.*\.0\.self_attn.*"],
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "weights": numbers("channel", false),
                "input_activations": numbers("token", true),
                "output_activations": null,
            }},
        });
        change(&mut quantization);
        json["quantization_config"] = quantization;
        parse(&json).map(|config| config.quantization.unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_compressed_tensors() {
        let read = compressed(|_| {}).unwrap();
        assert_eq!(read.weight_scales, WeightScales::PerOutput);
        assert_eq!(read.input_scales, InputScales::PerToken { bound: f32::INFINITY });
        assert!(!read.converts("model.layers.0.self_attn.q_proj"));
        assert!(read.converts("model.layers.10.self_attn.q_proj"));
        let group = |quantization: &mut Value| quantization["config_groups"]["group_0"].take();
        let read = compressed(|quantization| {
            let mut group = group(quantization);
            group["weights"]["strategy"] = "tensor".into();
            group["input_activations"]["strategy"] = "tensor".into();
            group["input_activations"]["dynamic"] = false.into();
            quantization["config_groups"]["group_0"] = group;
        });
        let read = read.unwrap();
        assert_eq!((read.weight_scales, read.input_scales), (WeightScales::PerTensor, InputScales::Stored));
        for (pointer, value, told) in [
            ("/format", json!("pack-quantized"), "pack-quantized"),
            ("/ignore", json!(["re:("]), "re:("),
            ("/config_groups", json!({}), "one group"),
            ("/config_groups/group_0/targets", json!(["re:.*mlp.*"]), "target"),
            ("/config_groups/group_0/input_activations", Value::Null, "both"),
            ("/config_groups/group_0/weights/num_bits", json!(4), "8 bits"),
            ("/config_groups/group_0/weights/type", json!("int"), "8 bits"),
            ("/config_groups/group_0/weights/symmetric", json!(false), "8 bits"),
            ("/config_groups/group_0/weights/strategy", json!("group"), "group"),
            ("/config_groups/group_0/input_activations/dynamic", json!(false), "stored scales"),
            ("/config_groups/group_0/input_activations/strategy", json!("tensor"), "dynamically"),
        ] {
            let error = compressed(|json| *json.pointer_mut(pointer).unwrap() = value).unwrap_err();
            assert!(error.contains("quantization_config") && error.contains(told), "{pointer}: {error}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            ("/model_type", json!("qwen2"), "config.json: model_type is \"qwen2\"; only \"llama\" is served"),
            ("/hidden_size", json!(0), "config.json: hidden_size is 0; it has to be 1 to 1048576"),
            (
                "/num_key_value_heads",
                json!(5),
                "config.json: num_key_value_heads is 5; it has to divide num_attention_heads, 32",
            ),
            ("/head_dim", json!(63), "config.json: head_dim is 63; it has to be even"),
            (
                "/rms_norm_eps",
                json!(-1.0),
                "config.json: rms_norm_eps is -1; it has to be at least 0 and below 1",
            ),
            (
                "/attention_bias",
                json!(true),
                "config.json: attention_bias is true; linears with a bias are not served",
            ),
            ("/hidden_act", json!("gelu"), "config.json: hidden_act is \"gelu\"; only \"silu\" is served"),
            ("/rope_theta", json!(0.5), "config.json: rope_theta is 0.5; it has to be a number above 1"),
            (
                "/rope_scaling/rope_type",
                json!("yarn"),
                "config.json: rope_scaling.rope_type is \"yarn\"; only \"default\" and \"llama3\" are served",
            ),
            (
                "/rope_scaling/factor",
                Value::Null,
                "config.json: rope_scaling.factor is missing; rope_type \"llama3\" needs it",
            ),
            (
                "/eos_token_id",
                json!([1, 128_256]),
                "config.json: eos_token_id is 128256; it has to be below vocab_size, 128256",
            ),
            (
                "/quantization_config",
                json!({"quant_method": "awq"}),
                "config.json: quantization_config.quant_method is \"awq\"; only \"fbgemm_fp8\" and \"compressed-tensors\" are served",
            ),
            (
                "/quantization_config",
                json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 0}),
                "config.json: quantization_config.activation_scale_ub is 0; it has to be a number above 0",
            ),
        ];
        for (pointer, value, message) in cases {
            let mut json = config_json();
            if let Some(place) = json.pointer_mut(pointer) {
                *place = value;
            } else {
                json[&pointer[1..]] = value;
            }
            assert_eq!(parse(&json).unwrap_err().to_string(), message);
        }
        let mut json = config_json();
        json.as_object_mut().unwrap().remove("rms_norm_eps");
        assert!(
            parse(&json).unwrap_err().to_string().starts_with("config.json: missing field `rms_norm_eps`")
        );
    }
}
