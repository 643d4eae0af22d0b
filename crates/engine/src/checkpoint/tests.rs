use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::*;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}"#;

/// A safetensors file of this header and so many bytes after it.
fn write(path: &Path, header: &Value, data: usize) {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data).map(|byte| byte as u8));
    fs::write(path, bytes).unwrap();
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    folder
}

fn error_of(header: &Value, data: usize) -> String {
    let folder = folder();
    write(&folder.path().join(SINGLE_FILE), header, data);
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    error.replace(&format!("{}/", folder.path().display()), "")
}

#[test]
fn reads_only_the_rows_and_columns_asked_for() {
    let folder = folder();
    let header = json!({
        "__metadata__": {"format": "pt"},
        "first": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "second": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [3, 27]},
    });
    write(&folder.path().join(SINGLE_FILE), &header, 27);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensor = checkpoint.tensor("second", &[Stored::BF16], &[4, 3]).unwrap();
    let mut bytes = Vec::new();
    tensor.read(1..3, 1..3, &mut bytes).unwrap();
    assert_eq!(bytes, [11, 12, 13, 14, 17, 18, 19, 20]);
    tensor.read(3..4, 0..3, &mut bytes).unwrap();
    assert_eq!(bytes, [21, 22, 23, 24, 25, 26]);

    let error = |name, dtype, shape: &[usize]| {
        let error = checkpoint.tensor(name, &[dtype], shape).err().unwrap().to_string();
        error.replace(&folder.path().display().to_string(), "DIR")
    };
    assert_eq!(error("third", Stored::BF16, &[4, 3]), "DIR: tensor third is missing");
    assert_eq!(
        error("second", Stored::BF16, &[3, 4]),
        "DIR/model.safetensors: tensor second is [4, 3]; config.json makes it [3, 4]"
    );
    assert_eq!(
        error("second", Stored::F8_E4M3, &[4, 3]),
        "DIR/model.safetensors: tensor second is BF16; config.json asks for F8_E4M3"
    );
}

#[test]
fn bad_headers_name_file_and_tensor() {
    let f32_at = |shape: Value, from: usize, to: usize| json!({"dtype": "F32", "shape": shape, "data_offsets": [from, to]});
    let cases = [
        (
            json!({"a": f32_at(json!([2]), 0, 8), "b": f32_at(json!([2]), 4, 12)}),
            12,
            "tensor b starts at 4, the tensor before it ends at 8",
        ),
        (
            json!({"a": f32_at(json!([2]), 0, 8), "b": f32_at(json!([2]), 0, 8)}),
            8,
            "tensor b starts at 0, the tensor before it ends at 8",
        ),
        (
            json!({"a": f32_at(json!([2]), 0, 8), "b": f32_at(json!([2]), 12, 20)}),
            20,
            "tensor b starts at 12, the tensor before it ends at 8",
        ),
        (json!({"a": f32_at(json!([3]), 0, 8)}), 8, "tensor a is F32 [3], 12 bytes, but lies at 0..8"),
        (json!({"a": f32_at(json!([2]), 8, 0)}), 8, "tensor a is F32 [2], 8 bytes, but lies at 8..0"),
        (
            json!({"a": f32_at(json!([4_611_686_018_427_387_904_u64, 4]), 0, 8)}),
            8,
            "tensor a is F32 [4611686018427387904, 4], which no file can hold",
        ),
        (
            json!({"a": f32_at(json!([1_u64 << 40]), 0, 1 << 42)}),
            8,
            "tensor a ends at 4398046511104, but the file has 8 bytes of tensors: it is cut off",
        ),
        (
            json!({"a": f32_at(json!([4]), 0, 16)}),
            15,
            "tensor a ends at 16, but the file has 15 bytes of tensors: it is cut off",
        ),
        (
            json!({"a": f32_at(json!([4]), 0, 16)}),
            17,
            "the last tensor ends at 16, but the file has 17 bytes of tensors",
        ),
        (
            json!({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}),
            2,
            "tensor a is F4 [3], which no file can hold",
        ),
        (json!({"a": {"dtype": "F99"}}), 0, "safetensors header: tensor a: unknown variant `F99`"),
        (
            json!({"a": {"dtype": "F32", "shape": [1]}}),
            4,
            "safetensors header: tensor a: missing field `data_off",
        ),
        (
            json!({"a": f32_at(json!([-1]), 0, 4)}),
            4,
            "safetensors header: tensor a: invalid value: integer `-1`",
        ),
        (
            json!({"a": f32_at(json!([1.5]), 0, 4)}),
            4,
            "safetensors header: tensor a: invalid type: floating point",
        ),
        (json!({"a": [1, 2]}), 4, "safetensors header: tensor a: "),
        (json!([1, 2]), 4, "safetensors header: invalid type: sequence, expected an object of tensors"),
    ];
    for (header, data, expected) in cases {
        let error = error_of(&header, data);
        assert!(error.starts_with(&format!("model.safetensors: {expected}")), "{error}");
    }
}

#[test]
fn headers_that_are_no_json_or_name_a_tensor_twice_are_refused() {
    let a = r#""a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}"#;
    for (header, expected) in [
        (format!("{{{a}, {a}}}"), "safetensors header: tensor a is there twice"),
        (format!("{{{a}"), "safetensors header: EOF while parsing"),
        (format!("{{{a}}} x"), "safetensors header: trailing characters"),
        (format!("{{{a}, \"b\": }}"), "safetensors header: tensor b: expected value"),
        ("\u{0}".repeat(8), "safetensors header: expected value"),
        (String::new(), "safetensors header: EOF while parsing a value"),
    ] {
        let folder = folder();
        let path = folder.path().join(SINGLE_FILE);
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0]].concat();
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: {expected}", path.display())), "{error}");
    }
    // Space after the header and metadata of any kind are allowed.
    let folder = folder();
    let header = format!("{{\"__metadata__\": null, {a}}}   ");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0]].concat();
    fs::write(folder.path().join(SINGLE_FILE), bytes).unwrap();
    assert!(Checkpoint::open(folder.path()).is_ok());
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    let folder = folder();
    let path = folder.path().join(SINGLE_FILE);
    write(&path, &json!({"a": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]}}), 24);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let tensor = checkpoint.tensor("a", &[Stored::BF16], &[4, 3]).unwrap();
    let size = fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(size - 1).unwrap();
    let mut bytes = Vec::new();
    tensor.read(0..3, 0..3, &mut bytes).unwrap();
    for columns in [0..3, 1..3] {
        let error = tensor.read(0..4, columns, &mut bytes).unwrap_err().to_string();
        let expected = "tensor a is cut off: the file has shrunk since its header was read";
        assert_eq!(error, format!("{}: {expected}", path.display()));
    }
}

#[test]
fn what_is_no_file_of_weights_is_refused() {
    let folder = folder();
    fs::create_dir(folder.path().join(SINGLE_FILE)).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("model.safetensors: is no regular file"), "{error}");
    fs::remove_dir(folder.path().join(SINGLE_FILE)).unwrap();
    for (index, expected) in [
        ("{", "EOF while parsing"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map": {"a": 1}}"#, "invalid type: integer `1`"),
        (r#"{"weight_map": {"a": "a.bin"}}"#, "places tensor a in \"a.bin\""),
        (
            r#"{"weight_map": {"a": "a.safetensors"}}"#,
            "a.safetensors: is not there, and model.safetensors.index",
        ),
    ] {
        fs::write(folder.path().join(INDEX_FILE), index).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_header_longer_than_the_file_is_refused_before_it_is_read() {
    let folder = folder();
    for bytes in [&[][..], &u64::MAX.to_le_bytes()[..], &9_u64.to_le_bytes()[..]] {
        fs::write(folder.path().join(SINGLE_FILE), bytes).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with("no safetensors header within its first 100000000"), "{error}");
    }
}

#[test]
fn an_index_places_tensors_in_files() {
    let folder = folder();
    let tensor = json!({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]});
    write(&folder.path().join("one.safetensors"), &json!({"a": tensor}), 4);
    write(&folder.path().join("two.safetensors"), &json!({"b": tensor}), 4);
    let index = |map: BTreeMap<&str, &str>| {
        fs::write(folder.path().join(INDEX_FILE), json!({"weight_map": map}).to_string()).unwrap();
        Checkpoint::open(folder.path())
    };
    let checkpoint = index(BTreeMap::from([("a", "one.safetensors"), ("b", "two.safetensors")])).unwrap();
    assert!(checkpoint.tensor("a", &[Stored::F32], &[1]).is_ok());
    assert!(checkpoint.tensor("b", &[Stored::F32], &[1]).is_ok());

    let error = index(BTreeMap::from([("b", "one.safetensors")])).unwrap_err().to_string();
    assert!(error.ends_with("one.safetensors: no tensor b, which model.safetensors.index.json places here"));
    let error = index(BTreeMap::from([("a", "../one.safetensors")])).unwrap_err().to_string();
    assert!(error.ends_with("that is no safetensors file of this folder"), "{error}");
    fs::remove_file(folder.path().join(INDEX_FILE)).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("no model.safetensors and no model.safetensors.index.json in this folder"));
}

#[test]
fn the_digest_sees_files_and_headers() {
    let folder = folder();
    let digest = || Checkpoint::open(folder.path()).unwrap().digest().unwrap();
    let header = |name: &str, bytes: usize| json!({name: {"dtype": "U8", "shape": [bytes], "data_offsets": [0, bytes]}});
    let weights = folder.path().join(SINGLE_FILE);

    write(&weights, &header("a", 8), 8);
    let small = digest();
    assert_eq!(small, digest());
    fs::write(folder.path().join("README.md"), "not part of a model").unwrap();
    assert_eq!(small, digest());
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert_ne!(small, digest());
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_ne!(small, digest());

    let large = 16 << 20;
    write(&weights, &header("a", large), large);
    let first = digest();
    write(&weights, &header("b", large), large);
    assert_ne!(first, digest());
}
