//! Where the scales of FP8 linears stand in a checkpoint.

use std::fs;
use std::path::Path;

use herd_model::{Dtype as Activations, Parallelism};
use herd_scheduler::{LogitRows, SequenceId, StepEntry, StepPlan};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use super::fixture;
use crate::{CpuModel, Executor as _, Isa, LoadOptions};

/// A tensor: dtype, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Tiny with all linears in FP8, its tensors and configuration changed.
fn changed(
    tensors: impl Fn(&str, Stored) -> Vec<(String, Stored)>,
    config: impl FnOnce(&mut Value),
) -> tempfile::TempDir {
    let from = fixture("tiny-llama31/tiny-llama31-compressed-tensors-fp8");
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let given = SafeTensors::deserialize(&bytes).unwrap();
    let new: Vec<(String, Stored)> = given
        .tensors()
        .into_iter()
        .flat_map(|(name, view)| tensors(&name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    let views = new
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let mut json: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config(&mut json["quantization_config"]["config_groups"]["group_0"]);
    fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    folder
}

fn scalar(value: f32) -> Stored {
    (Dtype::F32, vec![1], value.to_le_bytes().to_vec())
}

/// The same scale for all rows of a weight; another one for each weight.
fn scale_of(name: &str) -> f32 {
    name.len() as f32 / 8192.0
}

fn logits(folder: &Path) -> Result<Vec<f32>, String> {
    let options = LoadOptions {
        parallelism: Parallelism::tensor(2),
        dtype: Activations::F32,
        kv_blocks: 1,
        host_blocks: 0,
        threads: 2,
        isa: Isa::detect(),
    };
    let mut model = CpuModel::load(folder, &options).map_err(|error| error.to_string())?;
    let entry = StepEntry {
        sequence: SequenceId(0),
        tokens: (1..20).collect(),
        start: 0,
        blocks: [0].into(),
        logits: LogitRows::Last,
    };
    Ok(model.step(&StepPlan { moves: vec![], entries: vec![entry] }).unwrap().logits)
}

fn is_scale(name: &str) -> bool {
    name.ends_with(".weight_scale")
}

#[test]
fn one_scale_a_weight_is_that_scale_in_every_row() {
    let same = |name: &str, (dtype, shape, bytes): Stored| {
        let row = scale_of(name).to_le_bytes();
        let new = if is_scale(name) {
            (Dtype::F32, shape.clone(), row.repeat(shape[0]))
        } else {
            (dtype, shape, bytes)
        };
        vec![(name.to_owned(), new)]
    };
    let one = |name: &str, stored: Stored| {
        vec![(name.to_owned(), if is_scale(name) { scalar(scale_of(name)) } else { stored })]
    };
    let rows = changed(same, |_| {});
    let single = changed(one, |group| group["weights"]["strategy"] = json!("tensor"));
    assert_eq!(logits(single.path()).unwrap(), logits(rows.path()).unwrap());
    // Neither is taken for the other.
    let error = logits(changed(one, |_| {}).path()).unwrap_err();
    assert!(error.contains("weight_scale") && error.contains("is [1]"), "{error}");
    let error =
        logits(changed(same, |group| group["weights"]["strategy"] = json!("tensor")).path()).unwrap_err();
    assert!(error.contains("weight_scale") && error.contains("one number"), "{error}");
}

fn by_stored_scales(group: &mut Value) {
    group["input_activations"]["strategy"] = json!("tensor");
    group["input_activations"]["dynamic"] = json!(false);
}

/// Adds a scale of the inputs beside each of the weight.
fn with_input_scales(scale: impl Fn(&str) -> Option<f32>) -> impl Fn(&str, Stored) -> Vec<(String, Stored)> {
    move |name, stored| {
        let module = name.strip_suffix(".weight_scale");
        let added = module.and_then(|module| Some((format!("{module}.input_scale"), scalar(scale(module)?))));
        [(name.to_owned(), stored)].into_iter().chain(added).collect()
    }
}

#[test]
fn stored_input_scales_are_used() {
    let of = |scale: f32| changed(with_input_scales(move |_| Some(scale)), by_stored_scales);
    let dynamic = logits(&fixture("tiny-llama31/tiny-llama31-compressed-tensors-fp8")).unwrap();
    let distance = |logits: &[f32]| super::largest_difference(logits, &dynamic);
    // Wide enough for every input here, and so close to what follows from the tokens.
    let wide = distance(&logits(of(1.0 / 16.0).path()).unwrap());
    // Clips nearly everything.
    let narrow = distance(&logits(of(1.0 / 65536.0).path()).unwrap());
    assert!(wide > 0.0 && wide < 1.0 && narrow > 2.0 * wide, "{wide} and {narrow}");
}

#[test]
fn scales_that_are_missing_or_no_numbers_are_named() {
    let missing = with_input_scales(|module| (!module.ends_with("2.mlp.down_proj")).then_some(0.1));
    let error = logits(changed(missing, by_stored_scales).path()).unwrap_err();
    assert!(error.contains("model.layers.2.mlp.down_proj.input_scale is missing"), "{error}");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 0.0, -0.0] {
        let bad = changed(with_input_scales(move |_| Some(bad)), by_stored_scales);
        let error = logits(bad.path()).unwrap_err();
        assert!(error.contains("input_scale") && error.contains("a scale is a number"), "{error}");
    }
}

/// Each of these is refused with the tensor's name when the slices that hold it are read.
#[test]
fn weights_and_scales_that_make_no_numbers_are_named() {
    const SCALE: &str = "model.layers.1.mlp.up_proj.weight_scale";
    const WEIGHT: &str = "model.layers.3.self_attn.o_proj.weight";
    type Spoil = Box<dyn Fn(&mut Stored)>;
    let scale_is = |value: f32| -> Spoil {
        let value = half::bf16::from_f32(value).to_le_bytes();
        Box::new(move |(_, _, bytes)| bytes.as_chunks_mut().0[300] = value)
    };
    let cases: [(&str, Spoil, &str); 11] = [
        (SCALE, scale_is(f32::NAN), "is NaN in row 300; a scale is a number above 0"),
        (SCALE, scale_is(f32::INFINITY), "is inf in row 300; a scale is a number above 0"),
        (SCALE, scale_is(0.0), "is 0 in row 300; a scale is a number above 0"),
        (SCALE, scale_is(-0.5), "is -0.5 in row 300; a scale is a number above 0"),
        (
            SCALE,
            Box::new(|(_, shape, _)| *shape = vec![1, 512]),
            "is [1, 512]; config.json makes it [512, 1]",
        ),
        (SCALE, Box::new(|(dtype, _, _)| *dtype = Dtype::I16), "is I16; config.json asks for F32 or BF16"),
        (WEIGHT, Box::new(|(_, _, bytes)| bytes[65_535] = 0x7f), "has weights that are not numbers"),
        (WEIGHT, Box::new(|(_, _, bytes)| bytes[0] = 0xff), "has weights that are not numbers"),
        (
            WEIGHT,
            Box::new(|(_, shape, _)| *shape = vec![65_536]),
            "is [65536]; config.json makes it [256, 256]",
        ),
        (
            WEIGHT,
            Box::new(|(_, shape, _)| *shape = vec![128, 512]),
            "is [128, 512]; config.json makes it [256, 256]",
        ),
        (WEIGHT, Box::new(|(dtype, _, _)| *dtype = Dtype::I8), "is I8; config.json asks for F8_E4M3"),
    ];
    for (tensor, spoil, expected) in cases {
        let spoilt = changed(
            |name, mut stored| {
                if name == tensor {
                    spoil(&mut stored);
                }
                vec![(name.to_owned(), stored)]
            },
            |_| {},
        );
        let error = logits(spoilt.path()).unwrap_err();
        let file = spoilt.path().join("model.safetensors");
        assert_eq!(error, format!("{}: tensor {tensor} {expected}", file.display()));
    }
}
