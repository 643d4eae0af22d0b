//! Small valid files and grammars, and a few that are wrong in a way of their own.

use serde_json::{Value, json};

/// Of a model of the tests, so that all there is in one is there.
pub(crate) const CONFIG: &[u8] =
    include_bytes!("../../../fixtures/tiny-llama31/tiny-llama31-bf16/config.json");
pub(crate) const TOKENIZER: &[u8] =
    include_bytes!("../../../fixtures/tiny-llama31/tiny-llama31-bf16/tokenizer.json");
const FBGEMM: &[u8] = include_bytes!("../../../fixtures/tiny-llama31/tiny-llama31-fbgemm-fp8/config.json");
const COMPRESSED: &[u8] =
    include_bytes!("../../../fixtures/tiny-llama31/tiny-llama31-compressed-tensors-fp8/config.json");

pub(crate) fn config() -> Vec<Vec<u8>> {
    let patterns =
        String::from_utf8_lossy(COMPRESSED).replace("lm_head", r"re:.*\\.(self_attn|mlp)\\.[a-z]+_proj$");
    let sparse = r#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}"#;
    vec![
        CONFIG.to_vec(),
        FBGEMM.to_vec(),
        COMPRESSED.to_vec(),
        patterns.into_bytes(),
        sparse.as_bytes().to_vec(),
        br#"{"bos_token_id": 1, "eos_token_id": [1, 2]}"#.to_vec(),
    ]
}

pub(crate) fn grammar() -> Vec<Vec<u8>> {
    let lark = r#"l
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,4}/
%ignore / /
"#;
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20, "pattern": "^[a-z]+$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", 7, null]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
        },
        "$defs": {"tag": {"anyOf": [{"type": "boolean"}, {"const": "none"}]}},
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    // Their first bytes have remainders of 0, 1 and 2 by 3.
    vec![
        lark.as_bytes().to_vec(),
        format!("m{schema}").into_bytes(),
        br"n(\d{3}-\d{4}|[a-f]+(x|y)?)( and more)*\.".to_vec(),
        b"n((a{500}){500}){500}".to_vec(),
    ]
}

pub(crate) fn safetensors() -> Vec<Vec<u8>> {
    let file = |header: &Value, data: usize| {
        let header = header.to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let tensor = |dtype: &str, shape: &[usize], from: usize, to: usize| json!({"dtype": dtype, "shape": shape, "data_offsets": [from, to]});
    vec![
        file(
            &json!({
                "__metadata__": {"format": "pt"},
                "model.norm.weight": tensor("BF16", &[4], 0, 8),
                "lm_head.weight": tensor("F32", &[2, 2], 8, 24),
                "a.weight_scale": tensor("F8_E4M3", &[2, 1], 24, 26),
                "none": tensor("I64", &[0], 26, 26),
            }),
            26,
        ),
        file(&json!({"x": tensor("F16", &[1 << 40, 1 << 20], 0, 1 << 61)}), 8),
        u64::MAX.to_le_bytes().to_vec(),
    ]
}

/// A model of one layer, as the specification of GGUF has it.
pub(crate) fn gguf() -> Vec<Vec<u8>> {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let text = |value: &str| [&8_u32.to_le_bytes()[..], &string(value)].concat();
    let number = |value: u32| [4_u32.to_le_bytes(), value.to_le_bytes()].concat();
    let float = |value: f32| [6_u32.to_le_bytes(), value.to_le_bytes()].concat();
    let list = |kind: u32, count: usize, items: Vec<u8>| {
        [&9_u32.to_le_bytes()[..], &kind.to_le_bytes(), &(count as u64).to_le_bytes(), &items].concat()
    };
    let tokens = ["a", "b", "ab", "<|end|>"];
    let types = [1_u32, 1, 1, 3];
    let keys = [
        ("general.architecture", text("llama")),
        ("general.alignment", number(32)),
        ("llama.block_count", number(1)),
        ("llama.context_length", number(64)),
        ("llama.embedding_length", number(4)),
        ("llama.feed_forward_length", number(4)),
        ("llama.attention.head_count", number(2)),
        ("llama.attention.head_count_kv", number(1)),
        ("llama.attention.layer_norm_rms_epsilon", float(1e-5)),
        ("llama.rope.freq_base", float(10_000.0)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("llama-bpe")),
        ("tokenizer.ggml.tokens", list(8, 4, tokens.iter().flat_map(|token| string(token)).collect())),
        ("tokenizer.ggml.token_type", list(5, 4, types.iter().flat_map(|kind| kind.to_le_bytes()).collect())),
        ("tokenizer.ggml.merges", list(8, 1, string("a b"))),
        ("tokenizer.ggml.bos_token_id", number(3)),
        ("tokenizer.ggml.eos_token_id", number(3)),
    ];
    // Row length first, as GGUF has it.
    let tensors: [(&str, &[u64]); 12] = [
        ("token_embd.weight", &[4, 4]),
        ("blk.0.attn_norm.weight", &[4]),
        ("blk.0.attn_q.weight", &[4, 4]),
        ("blk.0.attn_k.weight", &[4, 2]),
        ("blk.0.attn_v.weight", &[4, 2]),
        ("blk.0.attn_output.weight", &[4, 4]),
        ("blk.0.ffn_norm.weight", &[4]),
        ("blk.0.ffn_gate.weight", &[4, 4]),
        ("blk.0.ffn_up.weight", &[4, 4]),
        ("blk.0.ffn_down.weight", &[4, 4]),
        ("output_norm.weight", &[4]),
        ("rope_freqs.weight", &[1]),
    ];
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in &keys {
        bytes.extend(string(key));
        bytes.extend(value);
    }
    let mut end = 0_u64;
    for (name, shape) in &tensors {
        bytes.extend(string(name));
        bytes.extend((shape.len() as u32).to_le_bytes());
        bytes.extend(shape.iter().flat_map(|side| side.to_le_bytes()));
        // F32.
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(end.to_le_bytes());
        end += (4 * shape.iter().product::<u64>()).next_multiple_of(32);
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    // All ones: factors of RoPE that scale nothing.
    bytes.extend(1_f32.to_le_bytes().repeat(end as usize / 4));
    vec![bytes, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()]
}
