//! `herd models inspect`, from outside.

#![expect(clippy::unwrap_used, reason = "this is how a test fails")]

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn sizes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/model-sizes")
}

/// Name, format and shape of each tensor of a model.
fn tensors(model: &str) -> Vec<(String, String, String)> {
    let mut tensors = Vec::new();
    for line in fs::read_to_string(sizes().join(model).join("tensors.txt")).unwrap().lines() {
        let cells: Vec<&str> = line.split(' ').collect();
        let tensor = |name: String| (name, cells[1].to_owned(), cells[2].to_owned());
        let Some((before, rest)) = cells[0].split_once('{') else {
            tensors.push(tensor(cells[0].to_owned()));
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

/// A directory with the configuration of a model alone.
fn directory(model: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(sizes().join(model).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

fn write_list(folder: &Path, model: &str) {
    let mut file = File::create(folder.join("tensors.tsv")).unwrap();
    writeln!(file, "name\tdtype\tshape\tbytes\tshard").unwrap();
    for (name, format, shape) in tensors(model) {
        writeln!(file, "{name}\t{format}\t{shape}\t0\tmodel.safetensors").unwrap();
    }
}

fn write_index(folder: &Path, model: &str, total: u64) {
    let map: serde_json::Map<String, Value> = tensors(model)
        .into_iter()
        .enumerate()
        .map(|(at, (name, ..))| (name, format!("model-{}.safetensors", at % 3).into()))
        .collect();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A header, and a hole where the numbers would be.
fn write_weights(folder: &Path, model: &str) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, format, shape) in tensors(model) {
        let shape: Vec<u64> = shape.split('x').map(|side| side.parse().unwrap()).collect();
        let start = end;
        end += shape.iter().product::<u64>() * if format == "F32" { 4 } else { 2 };
        header.insert(name, json!({"dtype": format, "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

fn inspect(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd"));
    command.args(["models", "inspect"]).arg(folder).args(arguments).output().unwrap()
}

fn json_of(folder: &Path, arguments: &[&str]) -> Value {
    let Output { status, stdout, stderr } = inspect(folder, &[arguments, &["-o", "json"]].concat());
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    serde_json::from_slice(&stdout).unwrap()
}

fn text_of(folder: &Path, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = inspect(folder, arguments);
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

fn error_of(folder: &Path, arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = inspect(folder, arguments);
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

#[test]
fn headers_list_index_and_configuration_say_the_same() {
    const MODEL: &str = "llama-3.2-1b-instruct";
    let folder = directory(MODEL);
    let degrees = ["--tensor", "4", "--pipeline", "2", "--memory", "1GiB"];
    let look = |from: &str| {
        let mut seen = json_of(folder.path(), &degrees);
        assert_eq!(seen["weights"]["from"], from);
        seen["weights"]["files"].take();
        seen["weights"]["from"].take();
        seen
    };
    let by_config = look("config.json");
    write_index(folder.path(), MODEL, 2_471_628_800);
    assert_eq!(look("config.json and model.safetensors.index.json"), by_config);
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    write_list(folder.path(), MODEL);
    assert_eq!(look("tensors.tsv"), by_config);
    write_weights(folder.path(), MODEL);
    assert_eq!(look("the headers of its files"), by_config);

    assert_eq!(by_config["model"]["parameters"], 1_235_814_400_u64);
    let ranks: Vec<u64> = by_config["ranks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rank| rank["weight_bytes"].as_u64().unwrap())
        .collect();
    assert_eq!(ranks, [[374_669_312; 4], [374_673_408; 4]].concat());
    // Two of the eight KV heads of 64, over eight layers.
    assert_eq!(by_config["ranks"][5]["kv_bytes_per_token"], 2 * 2 * 64 * 8 * 2);
    assert_eq!(by_config["kv"]["bytes_per_token"], 32_768);
    let room = (1_u64 << 30) - 374_673_408;
    assert_eq!(by_config["kv"]["tokens"], room / 4096 / 64 * 64);
    assert_eq!(by_config["fits"], true);
}

#[test]
fn the_largest_model_fits_on_eight_ranks_in_fp8_alone() {
    const FP8: &str = "llama-3.1-405b-instruct-fp8";
    let (fp8, bf16) = (directory(FP8), directory("llama-3.1-405b-instruct"));
    let eight = ["--tensor", "8", "--memory", "80GiB"];
    let text = text_of(fp8.path(), &eight);
    assert_eq!(
        text,
        "LlamaForCausalLM, 405.85 billion parameters, fbgemm_fp8
126 layers, hidden size 16384, feed-forward 53248, 128 heads of 128, 8 KV heads, vocabulary 128256, context 131072
487.23 GB of weights, 1509 tensors; by config.json
  embedding     BF16 4.20 GB
  attention     BF16 143.75 GB
  feed-forward  BF16 10.47 GB, F32 60.9 MB, F8_E4M3 324.54 GB
  norms         BF16 8.3 MB
  output head   BF16 4.20 GB

tensor 8 x pipeline 1: 8 ranks
  RANKS      STAGE  LAYERS     WEIGHTS        KV PER TOKEN
  0-7        0      0-125      60.92 GB       64512 bytes

KV of a token has 516096 bytes in bf16
fits: 60.92 GB of weights in 80.00 GiB a rank, and KV of 387200 tokens, 3.0 times the context; what steps compute in comes on top
"
    );
    let text = text_of(bf16.path(), &eight);
    assert!(text.ends_with("does not fit: 101.47 GB of weights in 80.00 GiB a rank\n"), "{text}");
    let two = text_of(bf16.path(), &[&eight[..], &["--pipeline", "2"]].concat());
    assert!(two.contains("  8-15       1      63-125     50.74 GB       32256 bytes\n"), "{two}");
    assert!(two.contains("and KV of 1090112 tokens"), "{two}");
    assert_eq!(json_of(bf16.path(), &eight)["fits"], false);
    // KV in f32 has half the tokens.
    let wide = json_of(fp8.path(), &[&eight[..], &["--dtype", "f32"]].concat());
    assert_eq!(wide["kv"]["tokens"], 193_600);
}

#[test]
fn sizes_of_other_quantizations_are_told() {
    const MODEL: &str = "llama-3.1-405b-instruct-fp8-all-linears";
    let folder = directory(MODEL);
    let error = error_of(folder.path(), &[]);
    assert!(error.contains("config.json alone does not say what scales"), "{error}");
    write_index(folder.path(), MODEL, 410_099_965_952);
    let seen = json_of(folder.path(), &["--tensor", "8"]);
    // Scales in bf16, by the size of all.
    assert_eq!(seen["ranks"][7]["weight_bytes"], 51_276_975_104_u64);
    assert_eq!(seen["weights"]["files"], 3);
    assert_eq!(seen["quantization"], json!({"method": "compressed-tensors", "is_served": true}));
    assert_eq!((&seen["fits"], &seen["kv"]["tokens"]), (&Value::Null, &Value::Null));
    // Also of one that is not served.
    let path = folder.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap().replace("\"float-quantized\"", "\"pack-quantized\"");
    fs::write(&path, config).unwrap();
    assert!(text_of(folder.path(), &[]).contains("compressed-tensors, which Herd does not serve"));
}

#[test]
fn formats_that_are_no_quantization_have_their_sizes() {
    let folder = directory("llama-3.2-1b-instruct");
    let path = folder.path().join("config.json");
    let bf16 = fs::read_to_string(&path).unwrap();
    for (dtype, format, bytes) in [("float16", "F16", 2_u64), ("float32", "F32", 4)] {
        fs::write(&path, bf16.replace("bfloat16", dtype)).unwrap();
        let seen = json_of(folder.path(), &["--tensor", "2"]);
        assert_eq!(seen["weights"]["bytes"], 1_235_814_400 * bytes);
        assert_eq!(seen["weights"]["kinds"]["embedding"][format], 128_256 * 2048 * bytes);
        // The norms are on both ranks.
        assert_eq!(seen["ranks"][1]["weight_bytes"], 1_235_814_400_u64.midpoint(33 * 2048) * bytes);
    }
}

#[test]
fn what_does_not_add_up_is_named() {
    const MODEL: &str = "llama-3.2-1b-instruct";
    let folder = directory(MODEL);
    let error = error_of(folder.path(), &["--tensor", "3"]);
    assert!(error.contains("possible degrees: 1, 2, 4, 8, 16, 32"), "{error}");
    let error = error_of(folder.path(), &["--memory", "80GB"]);
    assert!(error.contains("is not KiB, MiB, GiB or TiB"), "{error}");
    write_index(folder.path(), MODEL, 7);
    let error = error_of(folder.path(), &[]);
    assert!(
        error.contains("says 7 bytes in all, and tensors as config.json has them are 2471628800"),
        "{error}"
    );
    write_weights(folder.path(), MODEL);
    let file = File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(1 << 20).unwrap();
    let error = error_of(folder.path(), &[]);
    assert!(error.contains("model.safetensors: tensor ") && error.contains("bytes of tensors"), "{error}");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    fs::write(folder.path().join("tensors.tsv"), "name\tdtype\tshape\nlm_head.weight\tBF17\t2x3\n").unwrap();
    let error = error_of(folder.path(), &[]);
    assert!(error.contains("line 2") && error.contains("unknown number format \"BF17\""), "{error}");
    fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(error_of(folder.path(), &[]).contains("config.json"));
}

/// A real checkpoint, with weights.
#[test]
fn a_checkpoint_of_the_fixtures_is_inspected() {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-fbgemm-fp8");
    let seen = json_of(&folder, &["--tensor", "2"]);
    assert_eq!(seen["weights"]["from"], "the headers of its files");
    let file = fs::metadata(folder.join("model.safetensors")).unwrap().len();
    let bytes = seen["weights"]["bytes"].as_u64().unwrap();
    assert!((file - 64 * 1024..file).contains(&bytes), "{bytes} of {file}");
    assert!(seen["weights"]["kinds"]["feed-forward"]["F8_E4M3"].as_u64() > Some(0));
    assert_eq!(seen["quantization"]["is_served"], true);
}
