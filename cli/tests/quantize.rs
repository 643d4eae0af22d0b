//! `herd models quantize`, from outside.

#![expect(clippy::unwrap_used, reason = "this is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16")
}

fn quantize(out: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd"));
    command.args(["models", "quantize"]).arg(tiny()).arg("--out").arg(out).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn prompts_choose_layers_and_bound() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("built-in");
    let Output { status, stdout, stderr } = quantize(&out, &["--to", "fbgemm_fp8"]);
    assert!(status.success(), "{}", text(&stderr));
    let stdout = text(&stdout);
    assert!(stdout.starts_with("calibrated on 8 prompts of "), "{stdout}");
    assert!(stdout.contains("layers 0, 3 stay as they are; activations are bounded at 1200: "), "{stdout}");
    assert!(text(&stderr).contains("calibration: "), "{}", text(&stderr));
    let report = json(&out.join("quantization_report.json"));
    assert_eq!((&report["prompts"], report["layers"].as_array().unwrap().len()), (&Value::from(8), 4));

    let file = root.path().join("prompts.txt");
    fs::write(&file, "fn main() {}\n\nlet x = 1;\n").unwrap();
    let out = root.path().join("own");
    let own =
        ["--to", "fbgemm_fp8", "--calibrate", file.to_str().unwrap(), "--keep-layers", "1", "--bound", "7.5"];
    let Output { status, stdout, stderr } = quantize(&out, &own);
    assert!(status.success(), "{}", text(&stderr));
    let stdout = text(&stdout);
    assert!(stdout.starts_with("calibrated on 2 prompts of "), "{stdout}");
    assert!(
        stdout.contains("layer 1 stays as it is; activations are bounded at 7.5: as you say"),
        "{stdout}"
    );
    assert_eq!(json(&out.join("config.json"))["quantization_config"]["activation_scale_ub"], 7.5);

    let out = root.path().join("none");
    let Output { status, stdout, .. } = quantize(&out, &["--to", "compressed-tensors", "--no-calibration"]);
    assert!(status.success() && !text(&stdout).contains("calibrated"));
    assert!(!out.join("quantization_report.json").exists());
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    for (arguments, expected) in [
        (&["--to", "compressed-tensors", "--bound", "3"][..], "compressed-tensors has no bound"),
        (&["--to", "fbgemm_fp8", "--bound", "0", "--no-calibration"], "--bound: 0 is not a positive number"),
        (&["--to", "fbgemm_fp8", "--keep-layers", "9"], "there is no layer 9"),
        (&["--to", "fbgemm_fp8", "--threads", "0"], "--threads is 0"),
        (&["--to", "fbgemm_fp8", "--calibrate", "/nowhere/prompts"], "/nowhere/prompts"),
        (&["--to", "fbgemm_fp8", "--calibrate", "x", "--no-calibration"], "cannot be used with"),
    ] {
        let Output { status, stderr, .. } = quantize(&out, arguments);
        assert!(!status.success() && text(&stderr).contains(expected), "{}", text(&stderr));
        assert!(!out.exists());
    }
}
