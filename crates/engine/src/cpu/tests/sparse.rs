//! Meta's models at full size, as sparse files: true headers, and holes where the weights would be. They open, validate and
//! plan, and each rank's bytes are those that another program reckoned; of one layer a rank reads its slices.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use herd_model::{Linear, Parallelism, ShardPlan, StoredFormat, StoredTensor};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::fixture;
use crate::checkpoint::Checkpoint;
use crate::clipped::RowsClipped;
use crate::cpu::load::Loader;
use crate::cpu::memory::Arena;

/// Where Hugging Face starts another file.
const FILE_BYTES: u64 = 5_000_000_000;

/// A tensor and the number of its file.
struct Placed {
    tensor: StoredTensor,
    file: usize,
}

/// Tensors of a model in the order in which they were published, by file.
struct Published {
    tensors: Vec<Placed>,
    files: usize,
}

impl Published {
    fn read(model: &str) -> Self {
        let mut listed = listed(model);
        listed.sort_by_key(|tensor| place_in_model(&tensor.name));
        let (mut file, mut bytes) = (0, 0);
        let mut tensors = Vec::new();
        for tensor in listed {
            if bytes > 0 && bytes + tensor.bytes() > FILE_BYTES {
                (file, bytes) = (file + 1, 0);
            }
            bytes += tensor.bytes();
            tensors.push(Placed { tensor, file });
        }
        Self { tensors, files: file + 1 }
    }

    fn file_name(&self, file: usize) -> String {
        match self.files {
            1 => "model.safetensors".to_owned(),
            files => format!("model-{:05}-of-{files:05}.safetensors", file + 1),
        }
    }

    /// The list as it was published with the reckoned bytes.
    fn list(&self) -> String {
        let mut list = "name\tdtype\tshape\tbytes\tshard\n".to_owned();
        for Placed { tensor, file } in &self.tensors {
            let shape: Vec<_> = tensor.shape.iter().map(ToString::to_string).collect();
            let (name, format, bytes) = (&tensor.name, tensor.format, tensor.bytes());
            let file = self.file_name(*file);
            let _ = writeln!(list, "{name}\t{format}\t{}\t{bytes}\t{file}", shape.join("x"));
        }
        list
    }
}

/// Lines such as `model.layers.{0,125}.mlp.up_proj.weight BF16 53248x16384`.
fn listed(model: &str) -> Vec<StoredTensor> {
    let mut tensors = Vec::new();
    for line in fs::read_to_string(sizes().join(model).join("tensors.txt")).unwrap().lines() {
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

/// Layer by layer, linears before norms, a scale behind its weight.
fn place_in_model(name: &str) -> (usize, usize, usize, bool) {
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        let after = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"];
        let place = after.iter().position(|known| *known == name).unwrap();
        return (if place == 0 { 0 } else { 2 }, place, 0, false);
    };
    let layer: usize = layer.parse().unwrap();
    let linear = Linear::ALL.iter().position(|linear| name.starts_with(&linear.module(layer)));
    let norm = if rest.starts_with("input") { 7 } else { 8 };
    (1, layer, linear.unwrap_or(norm), name.ends_with("_scale"))
}

fn sizes() -> PathBuf {
    fixture("model-sizes")
}

/// A checkpoint of holes, and where in it each tensor lies.
struct Sparse {
    folder: tempfile::TempDir,
    offsets: BTreeMap<String, (PathBuf, u64)>,
}

impl Sparse {
    fn write(model: &str, published: &Published) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::copy(sizes().join(model).join("config.json"), path.join("config.json")).unwrap();
        let mut offsets = BTreeMap::new();
        let mut weight_map = serde_json::Map::new();
        for file in 0..published.files {
            let name = published.file_name(file);
            let mut header = serde_json::Map::new();
            let mut places = Vec::new();
            let mut end = 0;
            for Placed { tensor, .. } in published.tensors.iter().filter(|placed| placed.file == file) {
                let start = end;
                end += tensor.bytes();
                let info = json!({
                    "dtype": tensor.format.to_string(), "shape": tensor.shape, "data_offsets": [start, end],
                });
                header.insert(tensor.name.clone(), info);
                places.push((tensor.name.clone(), start));
                weight_map.insert(tensor.name.clone(), json!(name));
            }
            let header = Value::Object(header).to_string();
            let data_start = 8 + header.len() as u64;
            let out = File::create(path.join(&name)).unwrap();
            out.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
            out.write_all_at(header.as_bytes(), 8).unwrap();
            out.set_len(data_start + end).unwrap();
            offsets.extend(
                places.into_iter().map(|(tensor, start)| (tensor, (path.join(&name), data_start + start))),
            );
        }
        if published.files > 1 {
            let index = json!({"metadata": {}, "weight_map": weight_map}).to_string();
            fs::write(path.join("model.safetensors.index.json"), index).unwrap();
        }
        Self { folder, offsets }
    }

    /// Writes numbers of a tensor from number `first` on.
    fn put(&self, tensor: &StoredTensor, first: usize, numbers: &[u8]) {
        let (path, offset) = &self.offsets[&tensor.name];
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(numbers, offset + first as u64 * tensor.format.bytes()).unwrap();
    }
}

/// 1.5, as it is stored.
fn mark(format: StoredFormat) -> &'static [u8] {
    match format {
        StoredFormat::Bf16 => &[0xc0, 0x3f],
        StoredFormat::F8E4m3 => &[0x3c],
        other => panic!("no linear is {other}"),
    }
}

/// 1, as a scale is stored.
fn one(format: StoredFormat) -> &'static [u8] {
    match format {
        StoredFormat::Bf16 => &[0x80, 0x3f],
        StoredFormat::F32 => &[0, 0, 0x80, 0x3f],
        other => panic!("no scale is {other}"),
    }
}

#[test]
fn models_of_full_size_open_plan_and_read_their_slices() {
    let summary: BTreeMap<String, Value> =
        serde_json::from_slice(&fs::read(sizes().join("summary.json")).unwrap()).unwrap();
    let sums = fs::read_to_string(sizes().join("SHA256SUMS")).unwrap();
    assert_eq!(summary.len(), sums.lines().count());
    let mut layouts = 0;
    for (model, expected) in summary {
        let published = Published::read(&model);
        let line = format!("{:x}  {model}/tensors.tsv", Sha256::digest(published.list()));
        assert!(sums.lines().any(|sum| sum == line), "{model}: this is not the list that was published");
        let sparse = Sparse::write(&model, &published);
        let checkpoint = Checkpoint::open(sparse.folder.path()).unwrap();
        let mut largest = 1;
        for (layout, stages) in expected["rank_bytes"].as_object().unwrap() {
            let (tensor, pipeline) = layout.strip_prefix("tp").unwrap().split_once("_pp").unwrap();
            let parallelism =
                Parallelism { tensor: tensor.parse().unwrap(), pipeline: pipeline.parse().unwrap() };
            let plan = ShardPlan::new(checkpoint.config(), parallelism).unwrap();
            for (shard, bytes) in plan.ranks().iter().zip(checkpoint.weight_bytes(&plan).unwrap()) {
                assert_eq!(
                    bytes,
                    stages[shard.stage].as_u64().unwrap(),
                    "{model} {layout}, rank {}",
                    shard.rank
                );
            }
            largest = largest.max(parallelism.tensor);
            layouts += 1;
        }
        let plan = ShardPlan::new(checkpoint.config(), Parallelism::tensor(largest)).unwrap();
        let read = read_layer(&checkpoint, &sparse, &published, &plan);
        println!("{model}: rank {} of {largest} holds {read} bytes of a layer", largest - 1);
    }
    assert_eq!(layouts, 88);
}

/// Reads what the last rank holds of the middle layer's linears, one after the other; returns the bytes.
fn read_layer(checkpoint: &Checkpoint, sparse: &Sparse, published: &Published, plan: &ShardPlan) -> usize {
    let config = checkpoint.config();
    let (layer, shard) = (config.layers / 2, plan.ranks().last().unwrap());
    let tensor =
        |name: &str| published.tensors.iter().map(|placed| &placed.tensor).find(|tensor| tensor.name == name);
    for linear in Linear::ALL {
        let weight = tensor(&format!("{}.weight", linear.module(layer))).unwrap();
        let [rows, columns] = linear.slice(config, shard);
        let [_, width] = linear.shape(config);
        // In its last row the first and the last number of the slice, and the numbers beside it.
        let last = (rows.end - 1) * width;
        sparse.put(weight, last + columns.start, mark(weight.format));
        sparse.put(weight, last + columns.end - 1, mark(weight.format));
        if columns.start > 0 {
            sparse.put(weight, last + columns.start - 1, mark(weight.format));
        }
        if let Some(scale) = tensor(&format!("{}.weight_scale", linear.module(layer))) {
            sparse.put(scale, 0, &one(scale.format).repeat(scale.shape[0]));
        }
    }
    let clipped = RowsClipped::default();
    let arena = Arena::default();
    let loader = Loader { checkpoint, shard, clipped: &clipped, arena: &arena };
    let mut bytes = 0;
    for linears in [
        &[Linear::Query, Linear::Key, Linear::Value][..],
        &[Linear::Output],
        &[Linear::Gate, Linear::Up],
        &[Linear::Down],
    ] {
        let projection = loader.projection(layer, linears[0], &linears[1..]).unwrap();
        bytes += projection.bytes();
        let slices = linears.iter().map(|linear| linear.slice(config, shard));
        let ends: Vec<usize> = slices
            .clone()
            .scan(0, |end, [rows, _]| {
                *end += rows.len();
                Some(*end)
            })
            .collect();
        let width = projection.first().inputs();
        assert_eq!(projection.first().outputs(), *ends.last().unwrap(), "{linears:?}");
        let mut row = vec![0.0; width];
        for output in 0..projection.first().outputs() {
            let is_marked = ends.contains(&(output + 1));
            if !is_marked && output % 97 != 0 {
                continue;
            }
            projection.first().read_output(output, &mut row);
            let found: Vec<_> = row.iter().enumerate().filter(|(_, number)| **number != 0.0).collect();
            let expected = if is_marked { vec![(0, &1.5), (width - 1, &1.5)] } else { vec![] };
            assert_eq!(found, expected, "output {output} of {linears:?}");
        }
    }
    bytes
}

/// What is wrong with a checkpoint of that size is found without reading it.
#[test]
fn a_model_of_full_size_that_does_not_add_up_is_refused() {
    const MODEL: &str = "llama-3.1-405b-instruct-fp8";
    let mut published = Published::read(MODEL);
    let at =
        published.tensors.iter().position(|placed| placed.tensor.name.contains("77.mlp.up_proj")).unwrap();
    published.tensors[at].tensor.shape = vec![16_384, 53_248];
    let sparse = Sparse::write(MODEL, &published);
    let checkpoint = Checkpoint::open(sparse.folder.path()).unwrap();
    let plan = ShardPlan::new(checkpoint.config(), Parallelism::tensor(8)).unwrap();
    let error = checkpoint.weight_bytes(&plan).unwrap_err().to_string();
    assert!(
        error.ends_with("77.mlp.up_proj.weight is [16384, 53248]; this model's is [53248, 16384]"),
        "{error}"
    );
    let (path, _) = &sparse.offsets["model.layers.77.mlp.up_proj.weight"];
    cut(path);
    let error = Checkpoint::open(sparse.folder.path()).unwrap_err().to_string();
    assert!(error.starts_with(&path.display().to_string()) && error.ends_with("it is cut off"), "{error}");
}

fn cut(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
}
