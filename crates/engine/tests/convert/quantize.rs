use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use herd_engine::convert::{ConvertError, Layout, NoProgress, Quantization, quantize as convert};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::restored::restored;
use crate::tiny::{fixture, json as read_json, tiny};

fn options(keep: &[usize]) -> Quantization {
    let keep_layers = Some(keep.iter().copied().collect());
    Quantization { layout: Layout::FbgemmFp8 { activation_scale_ub: 1200.0 }, keep_layers, report: None }
}

fn with_bound(activation_scale_ub: f64, keep: &[usize]) -> Quantization {
    Quantization { layout: Layout::FbgemmFp8 { activation_scale_ub }, ..options(keep) }
}

fn quantize(model: &Path, options: &Quantization) -> Result<tempfile::TempDir, ConvertError> {
    let root = tempfile::tempdir().unwrap();
    convert(model, &root.path().join("out"), options, false, &NoProgress).map(|_| root)
}

fn copy(from: &Path) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::write(root.path().join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    root
}

fn names(list: &Value) -> BTreeSet<&str> {
    list.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

#[test]
fn gives_the_bytes_of_the_reference() {
    for model in ["tiny-llama31", "sharp-llama31"] {
        let reference = fixture(&format!("{model}/{model}-fbgemm-fp8"));
        let root = quantize(&fixture(&format!("{model}/{model}-bf16")), &options(&[0, 3])).unwrap();
        let out = root.path().join("out");
        for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        {
            let bytes = |path: &Path| fs::read(path.join(name)).unwrap();
            assert!(bytes(&out) == bytes(&reference), "{model}: {name} differs");
        }
        let (mut config, mut expected) =
            (read_json(&out.join("config.json")), read_json(&reference.join("config.json")));
        let kept = |config: &mut Value| config["quantization_config"]["modules_to_not_convert"].take();
        let (kept, expected_kept) = (kept(&mut config), kept(&mut expected));
        assert_eq!(config, expected);
        // The reference of sharp leaves out the head, as Meta does; loaders never quantize it.
        let mut expected_kept = names(&expected_kept);
        expected_kept.insert("lm_head");
        assert_eq!(names(&kept), expected_kept);
    }
}

#[test]
fn gives_the_bytes_of_the_reference_in_compressed_tensors() {
    let all = Quantization { layout: Layout::CompressedTensors, keep_layers: None, report: None };
    let reference = fixture("sharp-llama31/sharp-llama31-compressed-tensors-fp8");
    let root = quantize(&fixture("sharp-llama31/sharp-llama31-bf16"), &all).unwrap();
    let out = root.path().join("out");
    let bytes = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
    assert!(bytes(&out) == bytes(&reference));
    assert_eq!(read_json(&out.join("config.json")), read_json(&reference.join("config.json")));

    let root = quantize(&tiny(), &Quantization { keep_layers: Some([1].into()), ..all }).unwrap();
    let config = read_json(&root.path().join("out/config.json"));
    let ignored = names(&config["quantization_config"]["ignore"]);
    assert_eq!(ignored.len(), 8);
    assert!(ignored.contains("model.layers.1.self_attn.k_proj") && ignored.contains("lm_head"));
}

/// Every bf16 value is an f32 value, and nearly every weight of the model an f16 value: codes and scales are the same where
/// all of a row are.
#[test]
fn quantizes_from_f32_and_f16() {
    let reference = fs::read(fixture("tiny-llama31/tiny-llama31-fbgemm-fp8/model.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    for (stored, least) in [(Dtype::F32, 1.0), (Dtype::F16, 0.999)] {
        let model = restored(&tiny(), stored);
        let root = quantize(model.path(), &options(&[0, 3])).unwrap();
        let bytes = fs::read(root.path().join("out/model.safetensors")).unwrap();
        let made = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(made.len(), reference.len());
        for (name, expected) in reference.iter() {
            let view = made.tensor(name).unwrap();
            if expected.dtype() == Dtype::BF16 {
                assert_eq!((view.dtype(), view.shape()), (stored, expected.shape()), "{name}");
                continue;
            }
            assert_eq!((view.dtype(), view.shape()), (expected.dtype(), expected.shape()), "{name}");
            let pairs = view.data().iter().zip(expected.data());
            let same = pairs.filter(|(one, other)| one == other).count() as f64;
            assert!(
                same >= least * view.data().len() as f64,
                "{name} from {stored:?}: {same} bytes are equal"
            );
        }
    }
}

#[test]
fn keeps_the_first_and_last_layer_unless_told() {
    let default = Quantization { keep_layers: None, ..options(&[]) };
    let root = quantize(&tiny(), &default).unwrap();
    let reference = fixture("tiny-llama31/tiny-llama31-fbgemm-fp8/model.safetensors");
    assert!(fs::read(root.path().join("out/model.safetensors")).unwrap() == fs::read(reference).unwrap());
}

#[test]
fn writes_the_bound() {
    let root = quantize(&tiny(), &with_bound(3.0, &[0, 3])).unwrap();
    let config = read_json(&root.path().join("out/config.json"));
    assert_eq!(config["quantization_config"]["activation_scale_ub"], json!(3.0));
}

/// A checkpoint in two files gives one in two files, with the same tensors and an index.
#[test]
fn keeps_the_files_of_a_split_checkpoint() {
    let model = copy(&tiny());
    let path = model.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut weight_map = BTreeMap::new();
    for (file, odd) in
        [("model-00001-of-00002.safetensors", false), ("model-00002-of-00002.safetensors", true)]
    {
        let part =
            tensors.tensors().into_iter().enumerate().filter(|(i, _)| (i % 2 == 1) == odd).map(|(_, t)| t);
        let part: Vec<_> = part.collect();
        weight_map.extend(part.iter().map(|(name, _)| (name.clone(), file)));
        fs::write(model.path().join(file), safetensors::serialize(part, None).unwrap()).unwrap();
    }
    fs::remove_file(path).unwrap();
    let index = json!({"metadata": {}, "weight_map": weight_map}).to_string();
    fs::write(model.path().join("model.safetensors.index.json"), index).unwrap();

    let root = quantize(model.path(), &options(&[0, 3])).unwrap();
    let out = root.path().join("out");
    let reference = fs::read(fixture("tiny-llama31/tiny-llama31-fbgemm-fp8/model.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let index = read_json(&out.join("model.safetensors.index.json"));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), reference.len());
    for (name, expected) in reference.iter() {
        let file = fs::read(out.join(index["weight_map"][name].as_str().unwrap())).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        let view = file.tensor(name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (expected.dtype(), expected.shape()), "{name}");
        assert!(view.data() == expected.data(), "{name} differs");
    }
}

#[test]
fn refuses_options_that_do_not_fit() {
    let message = |options: &Quantization| quantize(&tiny(), options).unwrap_err().to_string();
    assert_eq!(message(&options(&[0, 4])), "--keep-layers: there is no layer 4: the model has layers 0 to 3");
    assert_eq!(
        message(&options(&[0, 1, 2, 3])),
        "--keep-layers: all 4 layers are kept: nothing is left to quantize"
    );
    for bound in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let options = with_bound(bound, &[0]);
        assert!(message(&options).starts_with("--bound: "));
    }
}

#[test]
fn refuses_a_checkpoint_that_is_no_bf16_llama() {
    let message = |model: &Path| quantize(model, &options(&[0, 3])).unwrap_err().to_string();
    let quantized = fixture("tiny-llama31/tiny-llama31-fbgemm-fp8");
    assert!(
        message(&quantized)
            .ends_with("config.json: is already quantized (fbgemm_fp8): start from what it was made of")
    );

    // Quantized, and the configuration does not say so.
    let model = copy(&quantized);
    fs::copy(tiny().join("config.json"), model.path().join("config.json")).unwrap();
    let text = message(model.path());
    assert!(text.ends_with("is F8_E4M3: only checkpoints in bf16, f16 or f32 can be quantized"), "{text}");

    let model = copy(&tiny());
    let change = |key: &str, value: Value| {
        let mut config = read_json(&tiny().join("config.json"));
        config[key] = value;
        fs::write(model.path().join("config.json"), config.to_string()).unwrap();
    };
    change("model_type", json!("mistral"));
    assert!(message(model.path()).ends_with("model_type is mistral: only llama can be quantized"));
    change("num_hidden_layers", json!(5));
    assert!(message(model.path()).ends_with("tensor model.layers.4.mlp.down_proj.weight is missing"));
    change("num_hidden_layers", json!(4));
    let bytes = fs::read(model.path().join("model.safetensors")).unwrap();
    fs::write(model.path().join("model.safetensors"), &bytes[..bytes.len() - 2]).unwrap();
    assert!(message(model.path()).ends_with("it is cut off"));
    let index = json!({"weight_map": {"a": "../model.safetensors"}}).to_string();
    fs::write(model.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(
        message(model.path()).ends_with("tensor a: \"../model.safetensors\" is no safetensors file name")
    );
}

#[test]
fn never_writes_into_its_input() {
    let model = copy(&tiny());
    let error = convert(model.path(), model.path(), &options(&[0, 3]), true, &NoProgress).unwrap_err();
    assert!(error.to_string().ends_with("is the model to quantize: choose another --out"), "{error}");
}
