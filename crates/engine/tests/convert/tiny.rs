//! The tiny Llama 3.1 fixture, and the same model as a GGUF file in llama.cpp's layout.

use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::gguf_writer::GgufWriter;

pub(crate) const F32: u32 = 0;
pub(crate) const BF16: u32 = 30;

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures")).join(name)
}

pub(crate) fn tiny() -> PathBuf {
    fixture("tiny-llama31/tiny-llama31-bf16")
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The tiny model as GGUF: matrices in bf16, vectors in f32, rows of q and k permuted, RoPE scaling as factors.
pub(crate) fn tiny_gguf() -> GgufWriter {
    let mut gguf = GgufWriter::new();
    let config = json(&tiny().join("config.json"));
    let number = |key: &str| config[key].as_u64().unwrap() as u32;
    gguf.text("general.architecture", "llama");
    for (key, from) in [
        ("llama.block_count", "num_hidden_layers"),
        ("llama.context_length", "max_position_embeddings"),
        ("llama.embedding_length", "hidden_size"),
        ("llama.feed_forward_length", "intermediate_size"),
        ("llama.attention.head_count", "num_attention_heads"),
        ("llama.attention.head_count_kv", "num_key_value_heads"),
        ("llama.attention.key_length", "head_dim"),
        ("llama.attention.value_length", "head_dim"),
        ("llama.rope.dimension_count", "head_dim"),
    ] {
        gguf.u32(key, number(from));
    }
    gguf.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    gguf.f32("llama.rope.freq_base", 500_000.0);
    add_tokenizer(&mut gguf);

    let weights = fs::read(tiny().join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    for (name, view) in weights.iter() {
        let heads = match name {
            name if name.contains("q_proj") => number("num_attention_heads"),
            name if name.contains("k_proj") => number("num_key_value_heads"),
            _ => 0,
        } as usize;
        let data = view.data().to_vec();
        match view.shape() {
            [_] => {
                let values = data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32());
                gguf.tensor(&gguf_name(name), view.shape(), F32, values.flat_map(f32::to_le_bytes).collect());
            }
            _ if heads > 0 => {
                let row_bytes = data.len() / view.shape()[0];
                gguf.tensor(&gguf_name(name), view.shape(), BF16, permute(&data, heads, row_bytes));
            }
            _ => gguf.tensor(&gguf_name(name), view.shape(), BF16, data),
        }
    }
    let head_dim = number("head_dim") as usize;
    let factors = rope_factors(head_dim).into_iter().flat_map(f32::to_le_bytes).collect();
    gguf.tensor("rope_freqs.weight", &[head_dim / 2], F32, factors);
    gguf
}

/// Tokens, their types and merges of the tiny model.
pub(crate) fn vocabulary() -> (Vec<String>, Vec<i32>, Vec<String>) {
    let tokenizer = json(&tiny().join("tokenizer.json"));
    let mut tokens = vec![String::new(); 1024];
    let mut types = vec![1; 1024];
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        token.clone_into(&mut tokens[id.as_u64().unwrap() as usize]);
    }
    for token in tokenizer["added_tokens"].as_array().unwrap() {
        let id = token["id"].as_u64().unwrap() as usize;
        token["content"].as_str().unwrap().clone_into(&mut tokens[id]);
        types[id] = 3;
    }
    let merge = |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    (tokens, types, merges)
}

fn add_tokenizer(gguf: &mut GgufWriter) {
    let (tokens, types, merges) = vocabulary();
    gguf.text("tokenizer.ggml.model", "gpt2");
    gguf.text("tokenizer.ggml.pre", "llama-bpe");
    gguf.texts("tokenizer.ggml.tokens", &tokens);
    gguf.ints("tokenizer.ggml.token_type", &types);
    gguf.texts("tokenizer.ggml.merges", &merges);
    gguf.u32("tokenizer.ggml.bos_token_id", 1015);
    gguf.u32("tokenizer.ggml.eos_token_id", 1021);
    let config = json(&tiny().join("tokenizer_config.json"));
    gguf.text("tokenizer.chat_template", config["chat_template"].as_str().unwrap());
}

fn gguf_name(name: &str) -> String {
    let name = name.replace("model.layers.", "blk.").replace("post_attention_layernorm", "ffn_norm");
    let name = name.replace("input_layernorm", "attn_norm").replace("mlp.down_proj", "ffn_down");
    let name = name.replace("mlp.gate_proj", "ffn_gate").replace("mlp.up_proj", "ffn_up");
    let name = name.replace("self_attn.o_proj", "attn_output").replace("self_attn.q_proj", "attn_q");
    let name = name.replace("self_attn.k_proj", "attn_k").replace("self_attn.v_proj", "attn_v");
    let name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm");
    name.replace("lm_head", "output")
}

/// `reshape(heads, 2, d / 2, row).swapaxes(1, 2)`, as llama.cpp's converter does it.
fn permute(data: &[u8], heads: usize, row_bytes: usize) -> Vec<u8> {
    let half = data.len() / row_bytes / heads / 2;
    let mut permuted = Vec::with_capacity(data.len());
    for head in 0..heads {
        for pair in 0..half {
            for side in 0..2 {
                let row = (head * 2 + side) * half + pair;
                permuted.extend(&data[row * row_bytes..][..row_bytes]);
            }
        }
    }
    permuted
}

/// As llama.cpp's converter computes them: factor 8 over 128 positions, low and high frequency factors 1 and 4.
fn rope_factors(head_dim: usize) -> Vec<f32> {
    let (factor, low, high, context) = (8.0f64, 1.0, 4.0, 128.0);
    let wavelengths =
        (0..head_dim / 2).map(|i| std::f64::consts::TAU * 500_000f64.powf(2.0 * i as f64 / head_dim as f64));
    let divisor = |wavelength: f64| {
        if wavelength < context / high {
            return 1.0;
        }
        if wavelength > context / low {
            return factor;
        }
        let smooth = (context / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    wavelengths.map(|wavelength| divisor(wavelength) as f32).collect()
}
