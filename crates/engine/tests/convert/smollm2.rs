//! SmolLM2 as `cargo xtask models` imports it from its GGUF file.

use std::env;
use std::path::PathBuf;

use tokenizers::Tokenizer;

use crate::tiny::{fixture, json};

pub(crate) fn models() -> PathBuf {
    let cache = || {
        env::var_os("XDG_CACHE_HOME").map_or_else(
            || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache"),
            PathBuf::from,
        )
    };
    env::var_os("HERD_MODELS").map_or_else(|| cache().join("herd/models"), PathBuf::from)
}

#[test]
fn tokenizer_gives_the_reference_ids() {
    let path = models().join("smollm2-135m-bf16/tokenizer.json");
    if !path.exists() && env::var_os("HERD_FULL").is_none() {
        println!("skipped: {} is not there; cargo xtask models makes it", path.display());
        return;
    }
    let mut tokenizer = Tokenizer::from_file(&path).unwrap();
    tokenizer.set_encode_special_tokens(true);
    let cases = json(&fixture("smollm2/tokenizer-cases.json"));
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 50);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> =
            case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let encoding = tokenizer.encode(text, true).unwrap();
        assert_eq!(encoding.get_ids(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), text);
    }
    // A special token in user text is ordinary text when special tokens are off, and one id when they are on.
    let ids = |tokenizer: &Tokenizer| tokenizer.encode("<|im_end|>", false).unwrap().get_ids().to_vec();
    assert!(ids(&tokenizer).len() > 1);
    tokenizer.set_encode_special_tokens(false);
    assert_eq!(ids(&tokenizer), [2]);
}
