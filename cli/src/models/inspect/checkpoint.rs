//! A directory, as far as sizes need it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use herd_engine::tensors_of_file;
use herd_model::{
    CONFIG_FILE, ConfigError, INDEX_FILE, ModelConfig, SINGLE_FILE, StoredFormat, StoredTensor,
    expected_tensors, is_weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A list of tensors: name, format, shape, with tabs between them, further columns, and a first line that names them.
const LIST_FILE: &str = "tensors.tsv";
/// Of the configuration.
const QUANTIZATION: &str = "quantization_config";
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// What there is.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) config: ModelConfig,
    pub(super) architecture: String,
    pub(super) quantization: Option<Quantization>,
    pub(super) tensors: Vec<StoredTensor>,
    /// Of weights.
    pub(super) files: usize,
    /// What the tensors were read from.
    pub(super) from: String,
}

/// As the configuration says.
#[derive(Debug, Serialize)]
pub(super) struct Quantization {
    pub(super) method: String,
    /// Whether Herd computes with it.
    pub(super) is_served: bool,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    metadata: Metadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
struct Metadata {
    total_size: Option<u64>,
}

impl Checkpoint {
    /// Sizes are of the safetensors' headers; where these are not there, of the list, else of index and configuration.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let (config, json) = read_config(directory)?;
        let text = |field: &Value| field.as_str().map(str::to_owned);
        let quantization = text(&json["quantization_config"]["quant_method"])
            .map(|method| Quantization { method, is_served: config.quantization.is_some() });
        let index = index(directory)?;
        let (tensors, files, from) = if let Some(files) = weights(directory, index.as_ref()) {
            let mut tensors = Vec::new();
            for name in &files {
                tensors.extend(tensors_of_file(&directory.join(name))?);
            }
            (tensors, files.len(), "the headers of its files".to_owned())
        } else if directory.join(LIST_FILE).is_file() {
            let path = directory.join(LIST_FILE);
            let (tensors, files) = list(&read(&path)?).with_context(|| path.display().to_string())?;
            (tensors, files, LIST_FILE.to_owned())
        } else {
            let files = index.as_ref().map_or(0, |index| distinct(&index.weight_map));
            let tensors = derive(&config, &json, index.as_ref())?;
            let from = if index.is_some() {
                format!("{CONFIG_FILE} and {INDEX_FILE}")
            } else {
                CONFIG_FILE.to_owned()
            };
            (tensors, files, from)
        };
        let architecture = text(&json["architectures"][0]).unwrap_or_else(|| "llama".to_owned());
        Ok(Self { config, architecture, quantization, tensors, files, from })
    }
}

/// With a quantization that is not served too: sizes can be told all the same.
fn read_config(directory: &Path) -> Result<(ModelConfig, Value)> {
    let path = directory.join(CONFIG_FILE);
    let mut json: Value = serde_json::from_str(&read(&path)?).with_context(|| path.display().to_string())?;
    let parse = |json: &Value| ModelConfig::from_json(json.to_string().as_bytes(), None);
    let config = match parse(&json) {
        Err(ConfigError::Field { field, .. }) if field.starts_with(QUANTIZATION) => {
            let quantization = json[QUANTIZATION].take();
            let config = parse(&json);
            json[QUANTIZATION] = quantization;
            config
        }
        config => config,
    };
    Ok((config.with_context(|| directory.display().to_string())?, json))
}

fn index(directory: &Path) -> Result<Option<Index>> {
    let path = directory.join(INDEX_FILE);
    if !path.is_file() || directory.join(SINGLE_FILE).is_file() {
        return Ok(None);
    }
    let index: Index = serde_json::from_str(&read(&path)?).with_context(|| path.display().to_string())?;
    if let Some(place) = index.weight_map.values().find(|place| !is_weights(place)) {
        bail!("{}: {place:?} is no safetensors file of this directory", path.display());
    }
    Ok(Some(index))
}

/// Names of the weights' files, where all of them are there.
fn weights(directory: &Path, index: Option<&Index>) -> Option<Vec<String>> {
    let mut names: Vec<String> = match index {
        Some(index) => index.weight_map.values().cloned().collect(),
        None => vec![SINGLE_FILE.to_owned()],
    };
    names.sort();
    names.dedup();
    names.iter().all(|name| directory.join(name).is_file()).then_some(names)
}

fn distinct(weight_map: &BTreeMap<String, String>) -> usize {
    weight_map.values().collect::<BTreeSet<_>>().len()
}

/// Tensors, and how many files they are in.
fn list(text: &str) -> Result<(Vec<StoredTensor>, usize)> {
    let mut lines = text.lines();
    let columns: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
    let column = |name: &str| columns.iter().position(|column| *column == name);
    let needed =
        |name: &str| column(name).with_context(|| format!("the first line names no column {name:?}"));
    let (name, format, shape, file) = (needed("name")?, needed("dtype")?, needed("shape")?, column("shard"));
    let mut tensors = Vec::new();
    let mut files: BTreeSet<&str> = BTreeSet::new();
    for (number, line) in lines.enumerate().filter(|(_, line)| !line.is_empty()) {
        let cells: Vec<&str> = line.split('\t').collect();
        let place = || format!("line {}", number + 2);
        let cell = |at: usize| cells.get(at).copied().with_context(place);
        let sides = cell(shape)?.split('x').map(str::parse).collect::<Result<_, _>>().with_context(place)?;
        let format = cell(format)?.parse().with_context(place)?;
        tensors.push(StoredTensor { name: cell(name)?.to_owned(), format, shape: sides });
        files.extend(file.and_then(|at| cells.get(at).copied()));
    }
    Ok((tensors, files.len()))
}

/// What config and index say. Which linears are in FP8 an index shows by their scales; their format, by the size of all.
fn derive(config: &ModelConfig, json: &Value, index: Option<&Index>) -> Result<Vec<StoredTensor>> {
    let format = format_of(json)?;
    let quantization = &json["quantization_config"]["quant_method"];
    let Some(index) = index else {
        ensure!(
            quantization.is_null() || quantization == "fbgemm_fp8",
            "{CONFIG_FILE} alone does not say what scales {quantization} has: an index does"
        );
        return Ok(expected_tensors(config, format, StoredFormat::F32, |linear, layer| {
            linear.is_fp8(config, layer)
        }));
    };
    let mut totals = Vec::new();
    for scale in [StoredFormat::F32, StoredFormat::Bf16] {
        let tensors = expected_tensors(config, format, scale, |linear, layer| {
            index.weight_map.contains_key(&format!("{}.weight_scale", linear.module(layer)))
        });
        if let Some(tensor) = tensors.iter().find(|tensor| !index.weight_map.contains_key(&tensor.name)) {
            bail!("{INDEX_FILE} has no tensor {}", tensor.name);
        }
        let total: u64 = tensors.iter().map(StoredTensor::bytes).sum();
        if index.metadata.total_size.is_none_or(|size| size == total) {
            return Ok(tensors);
        }
        totals.push(total.to_string());
    }
    totals.dedup();
    bail!(
        "{INDEX_FILE} says {} bytes in all, and tensors as {CONFIG_FILE} has them are {}",
        index.metadata.total_size.unwrap_or_default(),
        totals.join(" or ")
    )
}

/// Of what is not quantized.
fn format_of(json: &Value) -> Result<StoredFormat> {
    let named = [&json["torch_dtype"], &json["dtype"]].into_iter().find_map(Value::as_str);
    match named {
        Some("bfloat16") | None => Ok(StoredFormat::Bf16),
        Some("float16") => Ok(StoredFormat::F16),
        Some("float32") => Ok(StoredFormat::F32),
        Some(other) => {
            bail!("{CONFIG_FILE}: torch_dtype is {other:?}; known are bfloat16, float16 and float32")
        }
    }
}

fn read(path: &Path) -> Result<String> {
    let error = || path.display().to_string();
    let bytes = fs::metadata(path).with_context(error)?.len();
    ensure!(bytes <= MAX_TEXT_BYTES, "{}: {bytes} bytes are too many", path.display());
    fs::read_to_string(path).with_context(error)
}
