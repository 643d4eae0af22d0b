//! Where tests find models: fixtures in the project, and data that belongs to published models and stays outside it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part, and this crate's unit tests do too"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use super::BundleFiles;

/// A file of this crate's test data.
pub fn data(name: &str) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The tiny model of the fixtures.
pub fn tiny() -> BundleFiles {
    bundle(&project().join("fixtures/tiny-llama31/tiny-llama31-bf16"))
}

/// SmolLM2, if it was imported.
pub fn smollm2() -> Option<BundleFiles> {
    let models = std::env::var_os("HERD_MODELS").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
        Some(cache?.join("herd/models"))
    });
    let folder = models?.join("smollm2-135m-bf16");
    if !folder.join("tokenizer.json").exists() {
        eprintln!("skipped: {} has no tokenizer.json; `cargo xtask models` imports it", folder.display());
        return None;
    }
    Some(bundle(&folder))
}

/// A file of the reference data that is not part of the project.
pub fn reference(name: &str) -> Option<Vec<u8>> {
    let path = reference_folder().join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            eprintln!(
                "skipped: {}: {error}; HERD_REFERENCE names the folder of reference data",
                path.display()
            );
            None
        }
    }
}

/// A model with the tokenizer of Llama 3.1 and a template, if the reference data is there.
pub fn llama31(chat_template: &str) -> Option<BundleFiles> {
    const PACKED: &str = "llama31-tokenizer/tokenizer.json.xz";
    reference(PACKED)?;
    let unpacked = Command::new("xz").arg("-dc").arg(reference_folder().join(PACKED)).output();
    let tokenizer = match unpacked {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout).unwrap(),
        other => {
            eprintln!("skipped: xz cannot unpack the tokenizer of Llama 3.1: {other:?}");
            return None;
        }
    };
    // It has the names that these two ids had in Llama 3.
    let tokenizer = tokenizer
        .replace("<|reserved_special_token_4|>", "<|eom_id|>")
        .replace("<|reserved_special_token_5|>", "<|python_tag|>")
        .into_bytes();
    let config = br#"{"vocab_size": 128256, "eos_token_id": [128001, 128008, 128009]}"#;
    let tokenizer_config = br#"{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}"#;
    Some(BundleFiles::from_iter([
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config.to_vec()),
        ("config.json", config.to_vec()),
        ("chat_template.jinja", chat_template.as_bytes().to_vec()),
    ]))
}

fn bundle(folder: &Path) -> BundleFiles {
    super::BUNDLE_FILE_NAMES
        .into_iter()
        .filter_map(|name| Some((name, std::fs::read(folder.join(name)).ok()?)))
        .collect()
}

fn reference_folder() -> PathBuf {
    std::env::var_os("HERD_REFERENCE").map_or_else(|| project().join("../shared/reference"), PathBuf::from)
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
