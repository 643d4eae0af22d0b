//! The cuda backend of a worker that has no kernels yet: it names what is missing, and ends.

use std::path::Path;
use std::process::Command;

/// What such a worker writes down, where the driver in `library` has this many devices.
fn last_words(library: Option<&Path>, devices: i32) -> serde_json::Value {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("termination-log");
    std::fs::write(&log, "").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd-worker"));
    command.args(["--backend", "cuda", "--model-dir"]).arg(crate::cpu::fixture("tiny-llama31-bf16"));
    command.arg("--termination-log").arg(&log).env("FAKE_CUDA_DEVICES", devices.to_string());
    match library {
        Some(library) => command.env("LD_LIBRARY_PATH", library),
        None => command.env_remove("LD_LIBRARY_PATH"),
    };
    for port in ["--grpc", "--http", "--kv-bind"] {
        command.args([port, "127.0.0.1:0"]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.trim_end().lines().filter(|line| line.contains("ERROR")).count(), 1, "{said}");
    assert!(!said.contains("panicked"), "{said}");
    serde_json::from_slice(&std::fs::read(&log).unwrap()).unwrap()
}

#[test]
fn without_a_device_it_says_so() {
    if Path::new("/dev/nvidiactl").exists() {
        println!("skipped: this machine has NVIDIA devices");
        return;
    }
    let words = last_words(None, 0);
    assert_eq!(words["reason"], "NoDevice");
    assert!(words["message"].as_str().unwrap().contains("libcuda.so.1"), "{words}");
}

#[test]
fn what_a_driver_reports_is_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/worker/libcuda.c");
    let library = dir.path().join("libcuda.so.1");
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    assert!(made.unwrap().success());
    // Other names it is looked for under come first.
    std::fs::copy(&library, dir.path().join("libcuda.so")).unwrap();

    let words = last_words(Some(dir.path()), 2);
    assert_eq!(words["reason"], "BackendNotSupported");
    let devices = "Fake H100 (80 GiB, compute capability 9.0), Fake H100 (80 GiB, compute capability 9.0)";
    assert!(words["message"].as_str().unwrap().ends_with(devices), "{words}");

    let words = last_words(Some(dir.path()), 0);
    assert_eq!(words["reason"], "NoDevice");
    assert!(words["message"].as_str().unwrap().contains("no device for this process"), "{words}");

    let words = last_words(Some(dir.path()), -1);
    assert_eq!(words["reason"], "NoDevice");
    assert!(words["message"].as_str().unwrap().contains("cuInit failed: CUDA_ERROR_UNKNOWN"), "{words}");
}
