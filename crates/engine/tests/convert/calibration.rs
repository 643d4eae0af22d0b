//! What calibration finds in tiny as it is, in tiny with a massive activation, and in SmolLM2, where it is there.

use std::fs;
use std::path::Path;

use half::bf16;
use herd_engine::convert::calibration::{Bound, BoundReason, ByHand, Calibration, Reason, calibrate};
use herd_engine::convert::{ConvertError, Layout, NoProgress, quantize};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::smollm2::models;
use crate::tiny::{fixture, json, tiny};

const FBGEMM: Layout = Layout::FbgemmFp8 { activation_scale_ub: 1200.0 };

/// Prompts of the reference: text that the model was trained on.
fn prompts(golden: &str) -> Vec<Vec<u32>> {
    let golden = json(&fixture(golden));
    let ids = |case: &serde_json::Value| {
        case["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    golden["cases"].as_array().unwrap().iter().map(ids).collect()
}

fn calibrated(model: &Path, layout: Layout, by_hand: &ByHand) -> Result<Calibration, ConvertError> {
    calibrate(model, layout, by_hand, &prompts("tiny-llama31/golden-bf16.json"), 2, &NoProgress)
}

fn kept(calibration: &Calibration) -> Vec<usize> {
    calibration.choice.kept.keys().copied().collect()
}

/// Tiny with lane 7 of the feed-forward network of a layer `factor` times as large, and most of it, but not all, taken back
/// by the down projection: like the real ones it outweighs all others in what comes out.
fn with_massive_activation(layer: usize, factor: f32) -> tempfile::TempDir {
    const LANE: usize = 7;
    const LEFT: f32 = 256.0;
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(tiny()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let path = copy.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let given = SafeTensors::deserialize(&bytes).unwrap();
    let (up, down) = (
        format!("model.layers.{layer}.mlp.up_proj.weight"),
        format!("model.layers.{layer}.mlp.down_proj.weight"),
    );
    let tensors: Vec<_> = given
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let mut data = view.data().to_vec();
            let width = view.shape().last().copied().unwrap();
            for (at, bytes) in data.as_chunks_mut().0.iter_mut().enumerate() {
                let factor = match &name {
                    name if *name == up && at / width == LANE => factor,
                    name if *name == down && at % width == LANE => LEFT / factor,
                    _ => continue,
                };
                *bytes = bf16::from_f32(bf16::from_le_bytes(*bytes).to_f32() * factor).to_le_bytes();
            }
            (name, view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    copy
}

#[test]
fn a_model_without_massive_activations_keeps_its_ends_alone() {
    let calibration = calibrated(&tiny(), FBGEMM, &ByHand::default()).unwrap();
    assert_eq!(kept(&calibration), [0, 3]);
    assert_eq!(calibration.choice.bound, Some(Bound { value: 1200.0, reason: BoundReason::Usual }));
    assert_eq!((calibration.prompts, calibration.layers.len()), (8, 4));
    // The largest weight of each linear, as another reader has it.
    let bytes = fs::read(tiny().join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    for layer in &calibration.layers {
        assert_eq!(layer.linears.len(), 3);
        for linear in &layer.linears {
            let name = format!("model.layers.{}.{}.weight", layer.layer, linear.linear);
            let values = weights.tensor(&name).unwrap().data().to_vec();
            let values = values.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32());
            let amax = values.fold(0.0, |amax: f32, weight| amax.max(weight.abs()));
            assert!((linear.weight_amax / amax - 1.0).abs() < 1e-6, "{name}: {} {amax}", linear.weight_amax);
            // Three bits of mantissa: one rounding is off by up to 1/16, and by less in the mean; a large one counts most.
            let error = linear.error.unwrap();
            assert!((0.005..0.06).contains(&error), "{name}: {error}");
            assert!(linear.clipped <= 0.0, "{name}");
            assert!(linear.median_token_amax <= linear.activation_amax);
        }
    }
}

#[test]
fn a_massive_activation_keeps_its_layer() {
    let model = with_massive_activation(2, 65536.0);
    let found = calibrated(model.path(), FBGEMM, &ByHand::default()).unwrap();
    assert_eq!(kept(&found), [0, 2, 3]);
    let Reason::MassiveActivation { linear, amax } = &found.choice.kept[&2] else {
        panic!("{:?}", found.choice)
    };
    assert_eq!(linear, "mlp.down_proj");
    assert!(*amax > 1200.0, "{amax}");
    let down = &found.layers[2].linears[2];
    assert!(down.clipped > 0.0 && down.clipped <= 1.0);
    assert!(down.error.unwrap() > 2.0 * down.error_unclipped, "{down:?}");
    // The layers before it are as they were.
    let before = calibrated(&tiny(), FBGEMM, &ByHand::default()).unwrap();
    assert_eq!(found.layers[1].linears, before.layers[1].linears);

    let text = found.to_string();
    assert!(text.contains("stays: massive activations") && text.contains("layers 0, 2, 3 stay"), "{text}");

    // Where it may not stay, the bound goes up and clips nothing.
    let by_hand = ByHand { keep_layers: Some([0, 3].into()), bound: None };
    let raised = calibrated(model.path(), FBGEMM, &by_hand).unwrap();
    let Some(Bound { value, reason: BoundReason::Raised }) = raised.choice.bound else { panic!("{raised}") };
    assert!(value >= *amax, "{value}");
    assert!(raised.layers[2].linears[2].clipped <= 0.0);
    let by_hand = ByHand { bound: Some(300.0), ..by_hand };
    let bound = calibrated(model.path(), FBGEMM, &by_hand).unwrap();
    assert_eq!(bound.choice.bound, Some(Bound { value: 300.0, reason: BoundReason::ByHand }));
    assert!(bound.layers[2].linears[2].error.unwrap() > down.error.unwrap());
}

#[test]
fn all_linears_are_measured_where_all_are_converted() {
    let model = with_massive_activation(1, 65536.0);
    let found = calibrated(model.path(), Layout::CompressedTensors, &ByHand::default()).unwrap();
    // Scaled by its token's own amax nothing is clipped.
    assert_eq!((kept(&found), found.choice.bound), (vec![], None));
    assert!(found.layers.iter().all(|layer| layer.linears.len() == 7));
    let linears = found.layers.iter().flat_map(|layer| &layer.linears);
    assert!(linears.into_iter().all(|linear| linear.clipped == 0.0 && linear.error.unwrap() < 0.1));
}

#[test]
fn the_report_goes_along_with_the_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let model = with_massive_activation(1, 65536.0);
    let calibration = calibrated(model.path(), FBGEMM, &ByHand::default()).unwrap();
    quantize(model.path(), &out, &calibration.quantization(FBGEMM), false, &NoProgress).unwrap();
    let report = json(&out.join("quantization_report.json"));
    assert_eq!(report["layout"], "fbgemm_fp8");
    assert_eq!(report["choice"]["kept"]["1"]["reason"], "massive-activation");
    assert_eq!(report["choice"]["kept"]["0"]["reason"], "first-or-last");
    assert_eq!(report["choice"]["bound"]["value"], 1200.0);
    assert_eq!(report["layers"][1]["linears"][2]["linear"], "mlp.down_proj");
    let config = json(&out.join("config.json"));
    let kept = config["quantization_config"]["modules_to_not_convert"].as_array().unwrap();
    assert!(kept.iter().any(|name| name == "model.layers.1.mlp.down_proj"));
    assert!(!kept.iter().any(|name| name == "model.layers.2.mlp.down_proj"));
    assert_eq!(config["quantization_config"]["activation_scale_ub"], 1200.0);
}

#[test]
fn what_cannot_be_calibrated_is_named() {
    let run = |model: &Path, prompts: &[Vec<u32>], by_hand: &ByHand| {
        calibrate(model, FBGEMM, by_hand, prompts, 1, &NoProgress).unwrap_err().to_string()
    };
    let none = ByHand::default();
    assert_eq!(run(&tiny(), &[vec![]], &none), "--calibrate: there is no prompt of at least one token");
    let error = run(&tiny(), &[vec![1024]], &none);
    assert_eq!(error, "--calibrate: sequence 0: token 1024 is not below the vocabulary of 1024");
    let bound = ByHand { bound: Some(-1.0), ..none.clone() };
    assert_eq!(run(&tiny(), &[vec![1]], &bound), "--bound: -1 is not a positive number");
    let quantized = fixture("tiny-llama31/tiny-llama31-fbgemm-fp8");
    let error = run(&quantized, &[vec![1]], &none);
    assert!(error.ends_with("config.json: is already quantized: start from what it was made of"), "{error}");
    let model = with_massive_activation(1, f32::INFINITY);
    let error = run(model.path(), &[vec![1]], &none);
    assert!(error.contains("tensor model.layers.1.mlp.up_proj.weight holds values"), "{error}");
}

/// Which layers stay in bf16 in the reference's checkpoint: its inputs of layers 11 and 28 reach 3,066 and 2,375.
#[test]
fn smollm2_keeps_the_layers_of_the_reference() {
    let model = models().join("smollm2-135m-bf16");
    if !model.join("config.json").exists() {
        println!("skipped: {} is not there; cargo xtask models makes it", model.display());
        return;
    }
    let prompts = prompts("smollm2/golden-smollm2-135m.json");
    let calibration = calibrate(&model, FBGEMM, &ByHand::default(), &prompts, 2, &NoProgress).unwrap();
    println!("{calibration}");
    assert_eq!(kept(&calibration), [0, 11, 28, 29]);
    assert_eq!(calibration.choice.bound, Some(Bound { value: 1200.0, reason: BoundReason::Usual }));
    for (layer, expected) in [(11, 3066.0), (28, 2375.0), (29, 476.0)] {
        let down = &calibration.layers[layer].linears[2];
        assert_eq!(down.linear, "mlp.down_proj");
        assert!((down.activation_amax / expected - 1.0).abs() < 0.02, "{layer}: {}", down.activation_amax);
    }
}
