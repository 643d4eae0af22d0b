//! Bytes of every rank of Meta's models, against figures that another program made from the lists of their tensors
//! (`fixtures/model-sizes`).

#![expect(clippy::unwrap_used, clippy::panic, reason = "this is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use herd_model::{
    Dtype, ModelConfig, Parallelism, Part, ShardPlan, StoredFormat, StoredTensor, expected_tensors,
    kv_tokens, weight_bytes,
};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/model-sizes")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn summary() -> BTreeMap<String, Value> {
    serde_json::from_str(&read(&folder().join("summary.json"))).unwrap()
}

/// Without the quantization of models that are not served: sizes are of the tensors.
fn config(model: &str) -> ModelConfig {
    let mut json: Value = serde_json::from_str(&read(&folder().join(model).join("config.json"))).unwrap();
    if json["quantization_config"]["quant_method"] != "fbgemm_fp8" {
        json.as_object_mut().unwrap().remove("quantization_config");
    }
    ModelConfig::from_json(json.to_string().as_bytes(), None).unwrap()
}

/// Lines such as `model.layers.{0,125}.mlp.up_proj.weight BF16 53248x16384`.
fn tensors(model: &str) -> Vec<StoredTensor> {
    let mut tensors = Vec::new();
    for line in read(&folder().join(model).join("tensors.txt")).lines() {
        let [name, format, shape] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let shape: Vec<usize> = shape.split('x').map(|side| side.parse().unwrap()).collect();
        let format: StoredFormat = format.parse().unwrap();
        let tensor = |name: String| StoredTensor { name, format, shape: shape.clone() };
        let Some((before, rest)) = name.split_once('{') else {
            tensors.push(tensor(name.to_owned()));
            continue;
        };
        let (layers, after) = rest.split_once('}').unwrap();
        for range in layers.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            for layer in first.parse::<usize>().unwrap()..=last.parse().unwrap() {
                tensors.push(tensor(format!("{before}{layer}{after}")));
            }
        }
    }
    tensors
}

fn plan(config: &ModelConfig, tensor: usize, pipeline: usize) -> ShardPlan {
    ShardPlan::new(config, Parallelism { tensor, pipeline }).unwrap()
}

#[test]
fn every_rank_of_every_layout_has_the_bytes_that_were_reckoned_elsewhere() {
    let mut layouts = 0;
    for (model, expected) in summary() {
        let (config, tensors) = (config(&model), tensors(&model));
        assert_eq!(tensors.len(), expected["tensors"].as_u64().unwrap() as usize, "{model}");
        let total: u64 = tensors.iter().map(StoredTensor::bytes).sum();
        assert_eq!(total, expected["total_bytes"].as_u64().unwrap(), "{model}");
        let is_weight =
            |tensor: &&StoredTensor| !matches!(Part::of(&config, &tensor.name), Part::Scale { .. });
        let parameters: u64 = tensors.iter().filter(is_weight).map(StoredTensor::numbers).sum();
        assert_eq!(parameters, expected["parameters"].as_u64().unwrap(), "{model}");
        assert_eq!(
            config.kv_bytes_per_token(2) as u64,
            expected["kv_bytes_per_token_bf16"].as_u64().unwrap(),
            "{model}"
        );
        for (layout, stages) in expected["rank_bytes"].as_object().unwrap() {
            let (tensor, pipeline) = layout.strip_prefix("tp").unwrap().split_once("_pp").unwrap();
            let (tensor, pipeline) = (tensor.parse().unwrap(), pipeline.parse().unwrap());
            let plan = plan(&config, tensor, pipeline);
            let bytes = weight_bytes(&config, &plan, &tensors).unwrap();
            let stages: Vec<u64> =
                stages.as_array().unwrap().iter().map(|bytes| bytes.as_u64().unwrap()).collect();
            assert_eq!(stages.len(), pipeline);
            for (shard, bytes) in plan.ranks().iter().zip(&bytes) {
                assert_eq!(*bytes, stages[shard.stage], "{model} {layout}, rank {}", shard.rank);
            }
            layouts += 1;
        }
    }
    assert_eq!(layouts, 88);
}

#[test]
fn the_largest_models_fit_as_the_documentation_says() {
    let fits = |model: &str, tensor, pipeline| {
        let config = config(model);
        let plan = plan(&config, tensor, pipeline);
        let bytes = weight_bytes(&config, &plan, &tensors(model)).unwrap();
        kv_tokens(&config, &plan, &bytes, Dtype::Bf16, 80 << 30)
    };
    assert_eq!(fits("llama-3.1-405b-instruct-fp8", 8, 1), Some(387_200));
    assert_eq!(fits("llama-3.1-405b-instruct", 8, 1), None);
    assert_eq!(fits("llama-3.1-405b-instruct", 8, 2), Some(1_090_112));
}

/// A checkpoint of which no file is there yet is what its configuration says.
#[test]
fn what_is_served_is_known_from_its_configuration() {
    for model in summary().into_keys() {
        let config = config(&model);
        let stored = tensors(&model);
        if model.contains("all-linears") {
            continue;
        }
        let is_fp8 = |linear: herd_model::Linear, layer| linear.is_fp8(&config, layer);
        let mut expected = expected_tensors(&config, StoredFormat::Bf16, StoredFormat::F32, is_fp8);
        let mut stored = stored;
        expected.sort_by(|one, other| one.name.cmp(&other.name));
        stored.sort_by(|one, other| one.name.cmp(&other.name));
        assert_eq!(expected, stored, "{model}");
    }
}
