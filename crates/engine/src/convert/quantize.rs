//! A checkpoint in bf16, f16 or f32 to FP8: weights of linears as e4m3 codes with one f32 scale per row, everything else as it
//! was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use float8::F8E4M3;
use half::{bf16, f16};
use herd_model::Linear;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use super::calibration::REPORT_FILE;
use super::import::pretty;
use super::output::{FileSum, OutputDirectory};
use super::safetensors_file::{SafetensorsReader, SafetensorsWriter, TensorSpec};
use super::{ConvertError, Progress};

/// The largest e4m3 value. (`F8E4M3::MAX` of the float8 crate is 416.)
const E4M3_MAX: f32 = 448.0;
/// Rows of zeros get the scale of this amax, as in Meta's quantizer.
const LEAST_AMAX: f32 = 1e-12;
/// Bytes converted at a time, about.
const CHUNK_BYTES: usize = 8 << 20;
const FFN: [&str; 3] = ["down_proj", "gate_proj", "up_proj"];
const ATTENTION: [&str; 4] = ["k_proj", "o_proj", "q_proj", "v_proj"];
const HEAD: &str = "lm_head";
const INDEX: &str = "model.safetensors.index.json";

/// Files that go along unchanged, where they exist.
const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
];

/// Formats that are no quantization: what can be quantized.
const PLAIN: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// What [`quantize`] is to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantization {
    /// How it is stored, and what is quantized.
    pub layout: Layout,
    /// Layers that stay as they are. None: what is usual for the layout.
    pub keep_layers: Option<BTreeSet<usize>>,
    /// Goes along as [`REPORT_FILE`](super::calibration::REPORT_FILE).
    pub report: Option<Json>,
}

/// Layouts of FP8 checkpoints.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layout {
    /// That of Meta's Llama 3.1 405B FP8: the FFN alone. The first and the last layer are usually kept: inputs of their linears
    /// may exceed the bound by far.
    FbgemmFp8 {
        /// Bound of a token's amax when activations are quantized at run time; goes into config.json.
        activation_scale_ub: f64,
    },
    /// That of `compressed-tensors`, as vLLM makes it: all linears of the decoder, activations by token without a bound. No layer
    /// is usually kept.
    CompressedTensors,
}

impl Layout {
    /// As `--to` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FbgemmFp8 { .. } => "fbgemm_fp8",
            Self::CompressedTensors => "compressed-tensors",
        }
    }

    /// Linears of every layer that are converted.
    pub(super) const fn linears(self) -> &'static [Linear] {
        match self {
            Self::FbgemmFp8 { .. } => &[Linear::Gate, Linear::Up, Linear::Down],
            Self::CompressedTensors => &Linear::ALL,
        }
    }

    /// Linears of a layer that are converted.
    fn modules(self, layer: usize) -> Vec<String> {
        let attention = ATTENTION.map(|linear| format!("model.layers.{layer}.self_attn.{linear}"));
        match self {
            Self::FbgemmFp8 { .. } => ffn_modules(layer).collect(),
            Self::CompressedTensors => attention.into_iter().chain(ffn_modules(layer)).collect(),
        }
    }

    /// Layers that are kept unless others are named.
    fn usually_kept(self, layers: usize) -> BTreeSet<usize> {
        match self {
            Self::FbgemmFp8 { .. } => BTreeSet::from([0, layers - 1]),
            Self::CompressedTensors => BTreeSet::new(),
        }
    }

    /// What config.json says of it.
    fn config(self, keep: &BTreeSet<usize>, layers: usize, has_head: bool) -> Json {
        match self {
            Self::FbgemmFp8 { activation_scale_ub } => json!({
                "quant_method": "fbgemm_fp8",
                "activation_scale_ub": activation_scale_ub,
                "modules_to_not_convert": modules_to_not_convert(keep, layers, has_head),
            }),
            Self::CompressedTensors => {
                let kept = keep.iter().flat_map(|layer| self.modules(*layer));
                let ignore: Vec<String> = kept.chain([HEAD.to_owned()]).collect();
                json!({
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "quantization_status": "compressed",
                    "ignore": ignore,
                    "kv_cache_scheme": null,
                    "config_groups": {"group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 8, "type": "float", "symmetric": true, "strategy": "channel", "dynamic": false,
                            "observer": "minmax",
                        },
                        "input_activations": {
                            "num_bits": 8, "type": "float", "symmetric": true, "strategy": "token", "dynamic": true,
                        },
                        "output_activations": null,
                    }},
                })
            }
        }
    }
}

/// Quantizes the checkpoint in `model`, in bf16, f16 or f32, into the new directory `out`.
///
/// A row's scale is its amax / 448 in f32; a code is weight / scale in f32, rounded to the nearest e4m3 value, ties to even.
/// `force` lets it replace a model directory.
pub fn quantize(
    model: &Path,
    out: &Path,
    quantization: &Quantization,
    force: bool,
    progress: &dyn Progress,
) -> Result<Vec<FileSum>, ConvertError> {
    let Quantization { layout, keep_layers, report } = quantization;
    if let Layout::FbgemmFp8 { activation_scale_ub } = layout {
        check_bound(*activation_scale_ub)?;
    }
    if let (Ok(from), Ok(to)) = (model.canonicalize(), out.canonicalize())
        && from == to
    {
        return Err(ConvertError::output(out, "is the model to quantize: choose another --out"));
    }
    let (mut config, layers) = read_config(model)?;
    let keep = keep_layers.clone().unwrap_or_else(|| layout.usually_kept(layers));
    check_kept(&keep, layers)?;
    let converted: BTreeSet<String> = (0..layers)
        .filter(|layer| !keep.contains(layer))
        .flat_map(|layer| layout.modules(layer))
        .map(|m| format!("{m}.weight"))
        .collect();
    let files = open_files(model, &converted)?;

    let output = OutputDirectory::create(out, force)?;
    let has_head =
        files.values().flat_map(|(_, tensors)| tensors).any(|tensor| tensor.name == "lm_head.weight");
    config["quantization_config"] = layout.config(&keep, layers, has_head);
    output.write("config.json", &pretty(&config))?;
    if let Some(report) = report {
        output.write(REPORT_FILE, &pretty(report))?;
    }
    for name in COMPANIONS {
        let path = model.join(name);
        if path.is_file() {
            output.copy(&path, name)?;
        }
    }
    progress.stage("tensors", files.values().flat_map(|(_, tensors)| tensors).map(TensorSpec::bytes).sum());
    let mut weight_map = BTreeMap::new();
    let mut total = 0;
    for (name, (reader, tensors)) in &files {
        let specs: Vec<TensorSpec> = tensors
            .iter()
            .flat_map(|tensor| target_specs(tensor, converted.contains(&tensor.name)))
            .collect();
        for spec in &specs {
            weight_map.insert(spec.name.clone(), name.clone());
            total += spec.bytes();
        }
        let writer = SafetensorsWriter::create(&output.file(name), specs)?;
        for tensor in tensors {
            let convert = if converted.contains(&tensor.name) { quantize_rows } else { copy_rows };
            for_each_chunk(reader, tensor, CHUNK_BYTES, |first, row, bytes| {
                if !convert(&writer, tensor, first, row, bytes)? {
                    let what = format!("tensor {} holds values that are not finite", tensor.name);
                    return Err(ConvertError::input(&model.join(name), what));
                }
                progress.advance(bytes.len() as u64);
                Ok(())
            })?;
        }
    }
    if files.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        output.write(INDEX, &pretty(&index))?;
    }
    output.commit(progress)
}

/// Refuses a bound of activations that bounds nothing.
pub(super) fn check_bound(bound: f64) -> Result<(), ConvertError> {
    if bound.is_finite() && bound > 0.0 {
        return Ok(());
    }
    Err(ConvertError::Option { option: "--bound", what: format!("{bound} is not a positive number") })
}

fn read_config(model: &Path) -> Result<(Json, usize), ConvertError> {
    let path = model.join("config.json");
    let config = read_json(&path)?;
    let model_type = config["model_type"].as_str().unwrap_or("missing");
    if model_type != "llama" {
        return Err(ConvertError::input(
            &path,
            format!("model_type is {model_type}: only llama can be quantized"),
        ));
    }
    if let Some(quantization) = config.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantization["quant_method"].as_str().unwrap_or("an unnamed method");
        return Err(ConvertError::input(
            &path,
            format!("is already quantized ({method}): start from what it was made of"),
        ));
    }
    let layers = config["num_hidden_layers"].as_u64().filter(|layers| (1..=100_000).contains(layers));
    let layers =
        layers.ok_or_else(|| ConvertError::input(&path, "num_hidden_layers is not a positive number"))?;
    Ok((config, layers as usize))
}

fn read_json(path: &Path) -> Result<Json, ConvertError> {
    let bytes = fs::read(path).map_err(ConvertError::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| ConvertError::input(path, e.to_string()))
}

fn check_kept(keep: &BTreeSet<usize>, layers: usize) -> Result<(), ConvertError> {
    let error = |what| Err(ConvertError::Option { option: "--keep-layers", what });
    if let Some(layer) = keep.iter().find(|&&layer| layer >= layers) {
        return error(format!("there is no layer {layer}: the model has layers 0 to {}", layers - 1));
    }
    if keep.len() == layers {
        return error(format!("all {layers} layers are kept: nothing is left to quantize"));
    }
    Ok(())
}

fn ffn_modules(layer: usize) -> impl Iterator<Item = String> {
    FFN.into_iter().map(move |linear| format!("model.layers.{layer}.mlp.{linear}"))
}

/// In Meta's order: FFN of the kept layers, attention of all; then the head, where it has weights of its own.
fn modules_to_not_convert(keep: &BTreeSet<usize>, layers: usize, has_head: bool) -> Vec<String> {
    let ffn = keep.iter().copied().flat_map(ffn_modules);
    let attention = (0..layers)
        .flat_map(|layer| ATTENTION.map(|linear| format!("model.layers.{layer}.self_attn.{linear}")));
    ffn.chain(attention).chain(has_head.then(|| HEAD.to_owned())).collect()
}

type InputFiles = BTreeMap<String, (SafetensorsReader, Vec<TensorSpec>)>;

/// Opens every safetensors file of the checkpoint. All their tensors are in plain formats, all of `converted` are among them
/// and are matrices.
fn open_files(model: &Path, converted: &BTreeSet<String>) -> Result<InputFiles, ConvertError> {
    let mut files = InputFiles::new();
    let mut missing: BTreeSet<&str> = converted.iter().map(String::as_str).collect();
    for name in file_names(model)? {
        let path = model.join(&name);
        let reader = SafetensorsReader::open(&path)?;
        let tensors = reader.tensors();
        for tensor in &tensors {
            if !PLAIN.contains(&tensor.dtype) {
                let what = format!(
                    "tensor {} is {:?}: only checkpoints in bf16, f16 or f32 can be quantized",
                    tensor.name, tensor.dtype
                );
                return Err(ConvertError::input(&path, what));
            }
            if missing.remove(tensor.name.as_str()) && (tensor.shape.len() != 2 || tensor.bytes() == 0) {
                let what = format!("tensor {} has shape {:?}: not a matrix", tensor.name, tensor.shape);
                return Err(ConvertError::input(&path, what));
            }
        }
        files.insert(name, (reader, tensors));
    }
    match missing.first() {
        Some(name) => Err(ConvertError::input(model, format!("tensor {name} is missing"))),
        None => Ok(files),
    }
}

fn file_names(model: &Path) -> Result<BTreeSet<String>, ConvertError> {
    let path = model.join(INDEX);
    if !path.is_file() {
        return Ok(BTreeSet::from(["model.safetensors".to_owned()]));
    }
    let index = read_json(&path)?;
    let Some(weight_map) = index["weight_map"].as_object() else {
        return Err(ConvertError::input(&path, "weight_map is not an object"));
    };
    let mut names = BTreeSet::new();
    for (tensor, name) in weight_map {
        let plain = |name: &&str| name.ends_with(".safetensors") && !name.contains('/');
        let Some(name) = name.as_str().filter(plain) else {
            return Err(ConvertError::input(
                &path,
                format!("tensor {tensor}: {name} is no safetensors file name"),
            ));
        };
        names.insert(name.to_owned());
    }
    Ok(names)
}

fn scale_name(weight: &str) -> String {
    format!("{weight}_scale")
}

fn target_specs(tensor: &TensorSpec, quantized: bool) -> Vec<TensorSpec> {
    if !quantized {
        return vec![tensor.clone()];
    }
    let codes = TensorSpec { dtype: Dtype::F8_E4M3, ..tensor.clone() };
    let scales =
        TensorSpec { name: scale_name(&tensor.name), dtype: Dtype::F32, shape: vec![tensor.shape[0], 1] };
    vec![scales, codes]
}

/// Calls `visit(first row, bytes of a row, bytes)` for pieces of about `chunk_bytes`, of whole rows. A vector is one row.
fn for_each_chunk(
    reader: &SafetensorsReader,
    tensor: &TensorSpec,
    chunk_bytes: usize,
    mut visit: impl FnMut(usize, usize, &[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let row = tensor.shape.last().copied().unwrap_or(1) * tensor.dtype.bitsize() / 8;
    let total = tensor.bytes() as usize;
    let chunk = (chunk_bytes / row.max(1)).max(1) * row;
    let mut buffer = vec![0; chunk.min(total)];
    for start in (0..total).step_by(chunk.max(1)) {
        let bytes = &mut buffer[..chunk.min(total - start)];
        reader.read(&tensor.name, start as u64, bytes)?;
        visit(start / row.max(1), row, bytes)?;
    }
    Ok(())
}

fn copy_rows(
    writer: &SafetensorsWriter,
    tensor: &TensorSpec,
    first: usize,
    row: usize,
    bytes: &[u8],
) -> Result<bool, ConvertError> {
    writer.write(&tensor.name, (first * row) as u64, bytes)?;
    Ok(true)
}

/// False when a value is not finite.
fn quantize_rows(
    writer: &SafetensorsWriter,
    tensor: &TensorSpec,
    first: usize,
    row: usize,
    bytes: &[u8],
) -> Result<bool, ConvertError> {
    let rows = bytes.len() / row;
    let width = row * 8 / tensor.dtype.bitsize();
    let mut codes = vec![0; rows * width];
    let mut scales = vec![0; rows * 4];
    let finite = bytes
        .par_chunks_exact(row)
        .zip(codes.par_chunks_exact_mut(width))
        .zip(scales.par_chunks_exact_mut(4))
        .all(|((weights, codes), scale)| match quantize_row(tensor.dtype, weights, codes) {
            Some(value) => {
                scale.copy_from_slice(&value.to_le_bytes());
                true
            }
            None => false,
        });
    if finite {
        writer.write(&tensor.name, (first * width) as u64, &codes)?;
        writer.write(&scale_name(&tensor.name), (first * 4) as u64, &scales)?;
    }
    Ok(finite)
}

/// e4m3 codes of a row of little-endian weights in one of [`PLAIN`]; returns the scale, or nothing when a weight is not finite.
pub(crate) fn quantize_row(dtype: Dtype, weights: &[u8], codes: &mut [u8]) -> Option<f32> {
    match dtype {
        Dtype::F32 => quantize_values(|| weights.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)), codes),
        Dtype::F16 => {
            quantize_values(|| weights.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()), codes)
        }
        _ => {
            quantize_values(|| weights.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()), codes)
        }
    }
}

fn quantize_values<I: Iterator<Item = f32>>(weights: impl Fn() -> I, codes: &mut [u8]) -> Option<f32> {
    let amax = weights().try_fold(0f32, |amax, w| w.is_finite().then(|| amax.max(w.abs())))?;
    let scale = amax.max(LEAST_AMAX) / E4M3_MAX;
    for (code, weight) in codes.iter_mut().zip(weights()) {
        *code = F8E4M3::from_f32((weight / scale).clamp(-E4M3_MAX, E4M3_MAX)).to_bits();
    }
    Some(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code by the definition of e4m3: 4 exponent bits with bias 7, 3 mantissa bits, subnormals.
    fn value(code: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(code >> 3), f32::from(code & 7));
        if exponent == 0 {
            mantissa / 8.0 * 2f32.powi(-6)
        } else {
            (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7)
        }
    }

    fn encode(value: f32) -> u8 {
        F8E4M3::from_f32(value).to_bits()
    }

    /// At each midpoint between two codes the even one wins, next to it the nearer one.
    #[test]
    fn e4m3_rounds_to_nearest_even() {
        for low in 0..126 {
            let (a, b) = (value(low), value(low + 1));
            let middle = f32::midpoint(a, b);
            let even = low + low % 2;
            for (input, code) in [
                (a, low),
                (middle.next_down(), low),
                (middle, even),
                (middle.next_up(), low + 1),
                (b, low + 1),
            ] {
                assert_eq!(encode(input), code, "{input}");
                assert_eq!(encode(-input), code | 0x80, "-{input}");
            }
        }
        assert_eq!(value(126).to_bits(), E4M3_MAX.to_bits());
    }

    #[test]
    fn scales_a_row_by_its_amax() {
        let weights: Vec<u8> =
            [0.5f32, -2.0, 0.0, 1.0].iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect();
        let mut codes = [0; 4];
        assert_eq!(quantize_row(Dtype::BF16, &weights, &mut codes), Some(2.0 / 448.0));
        assert_eq!(codes, [encode(112.0), encode(-448.0), 0, encode(224.0)]);

        assert_eq!(quantize_row(Dtype::BF16, &[0; 8], &mut codes), Some(1e-12 / 448.0));
        assert_eq!(codes, [0; 4]);
        assert_eq!(quantize_row(Dtype::BF16, &bf16::NAN.to_le_bytes(), &mut codes[..1]), None);
        assert_eq!(quantize_row(Dtype::F16, &f16::NEG_INFINITY.to_le_bytes(), &mut codes[..1]), None);
    }

    #[test]
    fn chunks_make_no_difference() {
        let root = tempfile::tempdir().unwrap();
        let tensor = TensorSpec { name: "w".into(), dtype: Dtype::BF16, shape: vec![5, 3] };
        let weights: Vec<u8> =
            (0..15u8).flat_map(|w| bf16::from_f32(f32::from(w * w)).to_le_bytes()).collect();
        let source = root.path().join("source");
        SafetensorsWriter::create(&source, vec![tensor.clone()]).unwrap().write("w", 0, &weights).unwrap();
        let reader = SafetensorsReader::open(&source).unwrap();
        let quantize = |chunk_bytes| {
            let path = root.path().join(format!("target-{chunk_bytes}"));
            let writer = SafetensorsWriter::create(&path, target_specs(&tensor, true)).unwrap();
            for_each_chunk(&reader, &tensor, chunk_bytes, |first, row, bytes| {
                assert!(quantize_rows(&writer, &tensor, first, row, bytes)?);
                Ok(())
            })
            .unwrap();
            fs::read(path).unwrap()
        };
        let whole = quantize(1000);
        for chunk_bytes in [1, 6, 13, 24] {
            assert_eq!(quantize(chunk_bytes), whole);
        }
    }
}
