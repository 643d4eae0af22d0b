//! A checkpoint of random weights, of the shape that a config.json has: for models whose size alone matters.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use herd_model::{Linear, ModelConfig};

/// Bytes of a bf16.
const BF16: usize = 2;

/// Makes `out` with the config.json of `config` and weights in bf16 around zero.
pub(crate) fn make(config: &Path, out: &Path) -> Result<()> {
    let json = fs::read(config).with_context(|| config.display().to_string())?;
    let config = ModelConfig::from_json(&json, None)?;
    let mut tensors =
        vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, config.hidden_size])];
    for layer in 0..config.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![config.hidden_size]));
        }
        for linear in Linear::ALL {
            tensors.push((format!("{}.weight", linear.module(layer)), linear.shape(&config).to_vec()));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![config.hidden_size]));
    if !config.tied_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocab_size, config.hidden_size]));
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let from = end;
        end += BF16 * shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [from, end]}),
        );
    }
    fs::create_dir_all(out)?;
    fs::write(out.join("config.json"), &json)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(out.join("model.safetensors"))?);
    let header = serde_json::to_vec(&header)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut random: u64 = 1;
    for (_, shape) in &tensors {
        let numbers: usize = shape.iter().product();
        // Norms are ones, so that the residual stream stays in bounds.
        let is_norm = shape.len() == 1;
        for _ in 0..numbers {
            // Xorshift (Marsaglia, 2003). Sign, and an exponent of 2^-7 or 2^-6.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let weight = (random >> 32) as u16 & 0x80ff | 0x3c00;
            file.write_all(&if is_norm { 0x3f80_u16 } else { weight }.to_le_bytes())?;
        }
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}
