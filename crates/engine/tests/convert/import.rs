use std::fs;
use std::path::Path;

use herd_engine::convert::{ConvertError, FileSum, NoProgress, import_gguf};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::gguf_writer::GgufWriter;
use crate::tiny::{BF16, F32, fixture, json as read_json, tiny, tiny_gguf, vocabulary};

/// Imports from bytes into `root/out`. An import that fails leaves nothing.
fn import_bytes(root: &Path, bytes: &[u8]) -> Result<Vec<FileSum>, ConvertError> {
    let file = root.join("model.gguf");
    fs::write(&file, bytes).unwrap();
    let result = import_gguf(&file, &root.join("out"), false, &NoProgress);
    let left = fs::read_dir(root).unwrap().count();
    assert_eq!(left, if result.is_ok() { 2 } else { 1 });
    result
}

fn import(gguf: &GgufWriter) -> Result<tempfile::TempDir, ConvertError> {
    let root = tempfile::tempdir().unwrap();
    import_bytes(root.path(), &gguf.bytes()).map(|_| root)
}

fn message(gguf: &GgufWriter) -> String {
    let text = import(gguf).unwrap_err().to_string();
    let (_, what) = text.split_once("model.gguf: ").expect("the file is named");
    what.to_owned()
}

#[test]
fn gives_back_the_checkpoint_that_was_put_in() {
    for version in [2, 3] {
        let mut gguf = tiny_gguf();
        gguf.version = version;
        let root = import(&gguf).unwrap();
        let out = root.path().join("out");
        let bytes = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
        assert!(bytes(&out) == bytes(&tiny()), "model.safetensors differs");

        let mut config = read_json(&out.join("config.json"));
        let mut expected = read_json(&tiny().join("config.json"));
        expected.as_object_mut().unwrap().remove("transformers_version");
        for config in [&mut config, &mut expected] {
            config.sort_all_objects();
        }
        assert_eq!(config, expected);
        let generation = read_json(&out.join("generation_config.json"));
        assert_eq!(generation, json!({"bos_token_id": 1015, "eos_token_id": [1016, 1020, 1021]}));
        let tokenizer_config = read_json(&out.join("tokenizer_config.json"));
        let fixture = read_json(&tiny().join("tokenizer_config.json"));
        for key in ["chat_template", "bos_token", "eos_token", "model_max_length"] {
            assert_eq!(tokenizer_config[key], fixture[key], "{key}");
        }
    }
}

#[test]
fn llama_tokenizer_gives_the_ids_of_the_original() {
    let root = import(&tiny_gguf()).unwrap();
    let load = |path: &Path| Tokenizer::from_file(path.join("tokenizer.json")).unwrap();
    let (mut imported, mut original) = (load(&root.path().join("out")), load(&tiny()));
    let cases = read_json(&fixture("smollm2/tokenizer-cases.json"));
    let texts = cases.as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap());
    let special = "<|begin_of_text|>hi<|eot_id|> <|start_header_id|>";
    for text in texts.chain(["It's 12345\r\n\r\n  x", special]) {
        for (add_special, encode_special) in [(false, false), (true, false), (false, true)] {
            imported.set_encode_special_tokens(encode_special);
            original.set_encode_special_tokens(encode_special);
            let ids = |tokenizer: &Tokenizer| tokenizer.encode(text, add_special).unwrap().get_ids().to_vec();
            let expected = ids(&original);
            assert_eq!(ids(&imported), expected, "{text:?}");
            let decode = |tokenizer: &Tokenizer| tokenizer.decode(&expected, false).unwrap();
            assert_eq!(decode(&imported), decode(&original));
        }
    }
    assert_eq!(imported.get_vocab(true), original.get_vocab(true));
}

/// But for the rules about pairs of texts, which Llama's own file has and the fixture leaves out.
#[test]
fn llama_tokenizer_is_the_original() {
    let root = import(&tiny_gguf()).unwrap();
    let mut imported = read_json(&root.path().join("out/tokenizer.json"));
    let mut original = read_json(&tiny().join("tokenizer.json"));
    for tokenizer in [&mut imported, &mut original] {
        tokenizer["post_processor"]["pair"].take();
        tokenizer.sort_all_objects();
    }
    assert!(imported == original, "{imported:#}");
}

/// Digits are cut off one by one first, so that white space before a digit stays together. Cases 1 and 2 of the reference's
/// SmolLM2 tokenizer, in the tiny vocabulary.
#[test]
fn smollm_tokenizer_splits_digits() {
    let mut gguf = tiny_gguf();
    gguf.text("tokenizer.ggml.pre", "smollm");
    // A merge of digits, which must not come to pass. It takes the place of the last merge and its token.
    let (mut tokens, _, mut merges) = vocabulary();
    let last = merges.pop().unwrap().replace(' ', "");
    let place = tokens.iter_mut().find(|token| **token == last).unwrap();
    "67".clone_into(place);
    merges.push("6 7".to_owned());
    gguf.texts("tokenizer.ggml.tokens", &tokens);
    gguf.texts("tokenizer.ggml.merges", &merges);
    let root = import(&gguf).unwrap();
    let tokenizer = Tokenizer::from_file(root.path().join("out/tokenizer.json")).unwrap();
    for (text, expected) in [("a  1", &["a", "ĠĠ", "1"][..]), ("5  678", &["5", "ĠĠ", "6", "7", "8"])] {
        // With special tokens: none is put before a text, unlike with llama-bpe.
        assert_eq!(tokenizer.encode(text, true).unwrap().get_tokens(), expected);
    }
}

#[test]
fn no_output_tensor_means_tied_embeddings() {
    let mut gguf = tiny_gguf();
    gguf.remove_tensor("output.weight");
    gguf.remove_tensor("rope_freqs.weight");
    let root = import(&gguf).unwrap();
    let config = read_json(&root.path().join("out/config.json"));
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!(config["rope_scaling"], Value::Null);
    let weights = fs::read(root.path().join("out/model.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    assert!(weights.tensor("lm_head.weight").is_err());
}

#[test]
fn names_what_it_does_not_know() {
    type Spoil = fn(&mut GgufWriter);
    let cases: [(Spoil, &str); 17] = [
        (|g| g.text("general.architecture", "qwen2"), "architecture qwen2 is not supported: only llama is"),
        (|g| g.remove_key("llama.block_count"), "key llama.block_count is missing"),
        (
            |g| g.u32("llama.block_count", u32::MAX),
            "key llama.block_count is 4294967295: the file has 40 tensors",
        ),
        (|g| g.text("llama.block_count", "four"), "key llama.block_count is not an integer"),
        (|g| g.u32("llama.expert_count", 8), "key llama.expert_count: mixture-of-experts models"),
        (|g| g.u32("llama.attention.head_count_kv", 3), "8 attention heads cannot share 3 KV heads"),
        (|g| g.u32("llama.rope.dimension_count", 16), "key llama.rope.dimension_count is 16"),
        (|g| g.text("llama.rope.scaling.type", "yarn"), "key llama.rope.scaling.type: yarn scaling"),
        (|g| g.u32("llama.feed_forward_length", 513), "tensor blk.0.ffn_gate.weight is 512 x 256"),
        (
            |g| g.text("tokenizer.ggml.pre", "qwen2"),
            "key tokenizer.ggml.pre: pre-tokenizer qwen2 is not supported",
        ),
        (|g| g.text("tokenizer.ggml.model", "llama"), "key tokenizer.ggml.model: llama is not supported"),
        (
            |g| g.u32("tokenizer.ggml.eos_token_id", 1024),
            "key tokenizer.ggml.eos_token_id: there is no token 1024",
        ),
        (
            |g| g.ints("tokenizer.ggml.token_type", &[1; 9]),
            "1024 tokens and 9 token types do not fit the 1024 rows",
        ),
        (
            |g| g.texts("tokenizer.ggml.merges", &["a zzz".into()]),
            "key tokenizer.ggml.merges: merge 0 is not",
        ),
        (|g| g.remove_tensor("blk.2.attn_v.weight"), "tensor blk.2.attn_v.weight is missing"),
        (
            |g| g.tensor("blk.0.attn_q.bias", &[256], F32, vec![0; 1024]),
            "tensor blk.0.attn_q.bias has no place in a Llama checkpoint",
        ),
        (
            |g| g.tensor("rope_freqs.weight", &[16], F32, [2f32; 16].map(f32::to_le_bytes).concat()),
            "tensor rope_freqs.weight holds no llama3 RoPE scaling",
        ),
    ];
    for (spoil, expected) in cases {
        let mut gguf = tiny_gguf();
        spoil(&mut gguf);
        let message = message(&gguf);
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn names_the_tensor_that_is_broken() {
    let name = "blk.1.attn_norm.weight";
    for (shape, ty, data, expected) in [
        (&[256][..], 14, vec![0; 210], "is Q6_K: only F32, F16, BF16, Q4_0, Q4_1 and Q8_0 can be imported"),
        (&[250], 8, vec![0; 272], "rows of 250 elements are not whole blocks of Q8_0"),
        (&[1, 1, 1, 1, 256], F32, vec![0; 1024], "has 5 dimensions"),
        (&[usize::MAX, usize::MAX, 256], F32, vec![0; 1024], "has an impossible shape"),
        (&[usize::MAX / 4, 256], F32, vec![0; 1024], "lies beyond the end of the file"),
        (&[1 << 20, 256], F32, vec![0; 1024], "lies beyond the end of the file"),
        (&[256], F32, f32::NAN.to_le_bytes().repeat(256), "holds values that are not finite"),
        (
            &[256],
            BF16,
            f32::INFINITY.to_be_bytes()[..2].iter().rev().copied().collect::<Vec<_>>().repeat(256),
            "holds values",
        ),
    ] {
        let mut gguf = tiny_gguf();
        gguf.tensor(name, shape, ty, data);
        let message = message(&gguf);
        assert!(message.starts_with(&format!("tensor {name}")) && message.contains(expected), "{message}");
    }
}

#[test]
fn refuses_other_files_and_versions() {
    let root = tempfile::tempdir().unwrap();
    for (bytes, expected) in [
        (&b""[..], "header: not a GGUF file"),
        (b"PK\x03\x04 a zip", "header: not a GGUF file"),
        (b"GGUF\x01\0\0\0", "header: GGUF version 1 is not supported"),
        (b"GGUF\0\0\0\x03", "header: GGUF version 50331648 (a big-endian file) is not supported"),
        (
            b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
            "header: tensor count 18446744073709551615 does not fit",
        ),
        (
            b"GGUF\x03\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            "header: tensor count 256 does not fit the 8 bytes left in the file",
        ),
        (
            b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0key..",
            "key 0: string length 65536 does not fit the 5 bytes left in the file",
        ),
    ] {
        let message = import_bytes(root.path(), bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn does_not_touch_a_directory_that_is_there() {
    let root = import(&tiny_gguf()).unwrap();
    let (file, out) = (root.path().join("model.gguf"), root.path().join("out"));
    let message = import_gguf(&file, &out, false, &NoProgress).unwrap_err().to_string();
    assert!(message.ends_with("exists and is not empty: choose another --out, or pass --force"), "{message}");
    import_gguf(&file, &out, true, &NoProgress).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Cut anywhere, the file is refused.
    #[test]
    fn refuses_a_file_cut_short(cut in 0.0..1.0f64) {
        let bytes = tiny_gguf().bytes();
        let root = tempfile::tempdir().unwrap();
        let cut = (cut * bytes.len() as f64) as usize;
        prop_assert!(import_bytes(root.path(), &bytes[..cut]).is_err());
    }

    /// Whatever the header says, it ends in a result: no panic, no allocation that the file does not warrant.
    #[test]
    fn survives_a_spoilt_header(spoils in prop::collection::vec((0usize..40_000, any::<u8>()), 1..4)) {
        let mut bytes = tiny_gguf().bytes();
        for (at, byte) in spoils {
            bytes[at] = byte;
        }
        let root = tempfile::tempdir().unwrap();
        let _ = import_bytes(root.path(), &bytes);
    }
}
