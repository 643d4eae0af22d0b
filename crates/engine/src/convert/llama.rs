//! The `llama` architecture of GGUF and of Hugging Face: hyperparameters, tensor names, shapes and row order.

use serde_json::{Value as Json, json};

use super::ConvertError;
use super::gguf::{Gguf, GgufTensor};
use super::rope_scaling::Llama3Scaling;

/// Frequency factors of RoPE, one per pair of head elements: becomes `rope_scaling`.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// What config.json needs to know.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Llama {
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab: usize,
    pub(super) context: u32,
    pub(super) rms_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) rope_scaling: Option<Llama3Scaling>,
    pub(super) tied_embeddings: bool,
}

/// A tensor on its way from GGUF to Hugging Face.
#[derive(Debug)]
pub(super) struct TensorPlan<'a> {
    pub(super) source: &'a GgufTensor,
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// Rows per attention head, where the rows of each head are interleaved (q and k).
    pub(super) interleaved_head: Option<usize>,
}

impl Llama {
    /// Reads and checks the hyperparameters.
    pub(super) fn read(gguf: &Gguf) -> Result<Self, ConvertError> {
        let architecture = gguf.text("general.architecture")?;
        if architecture != "llama" {
            return Err(gguf.error(format!("architecture {architecture} is not supported: only llama is")));
        }
        let size = |key: &str| {
            let value = gguf.u32(key)? as usize;
            if value == 0 { Err(gguf.error(format!("key {key} is 0"))) } else { Ok(value) }
        };
        let optional =
            |key: &str, default: usize| gguf.optional_u32(key).map(|v| v.map_or(default, |v| v as usize));
        if optional("llama.expert_count", 0)? != 0 {
            return Err(gguf.error("key llama.expert_count: mixture-of-experts models are not supported"));
        }
        let layers = size("llama.block_count")?;
        let tensors = gguf.tensors().len();
        if layers > tensors {
            return Err(
                gguf.error(format!("key llama.block_count is {layers}: the file has {tensors} tensors"))
            );
        }
        let hidden = size("llama.embedding_length")?;
        let heads = size("llama.attention.head_count")?;
        let kv_heads = optional("llama.attention.head_count_kv", heads)?;
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(gguf.error(format!("{heads} attention heads cannot share {kv_heads} KV heads")));
        }
        let head_dim = optional("llama.attention.key_length", hidden / heads)?;
        for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
            let value = optional(key, head_dim)?;
            if value != head_dim {
                return Err(
                    gguf.error(format!("key {key} is {value}: only the head size, {head_dim}, is supported"))
                );
            }
        }
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(gguf.error(format!("heads of {head_dim} elements cannot be rotated")));
        }
        if let Some(kind) = gguf.optional_text("llama.rope.scaling.type")?.filter(|&kind| kind != "none") {
            return Err(gguf.error(format!("key llama.rope.scaling.type: {kind} scaling is not supported")));
        }
        let embedding = find(gguf, "token_embd.weight")?;
        let rope_theta = gguf.optional_float("llama.rope.freq_base")?.unwrap_or(10_000.0);
        Ok(Self {
            layers,
            hidden,
            ffn: size("llama.feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            vocab: embedding.rows,
            context: gguf.u32("llama.context_length")?,
            rms_eps: gguf.float("llama.attention.layer_norm_rms_epsilon")?,
            rope_theta,
            rope_scaling: read_rope_scaling(gguf, rope_theta, head_dim)?,
            tied_embeddings: !gguf.tensors().iter().any(|tensor| tensor.name == "output.weight"),
        })
    }

    /// Every tensor with its new name, in the order of the model. All that are needed are there, with the right shape, and
    /// no other.
    pub(super) fn tensors<'a>(&self, gguf: &'a Gguf) -> Result<Vec<TensorPlan<'a>>, ConvertError> {
        let (hidden, ffn, head) = (self.hidden, self.ffn, self.head_dim);
        let (q, kv) = (self.heads * head, self.kv_heads * head);
        let mut wanted = vec![(
            "token_embd.weight".to_owned(),
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab, hidden],
            None,
        )];
        for layer in 0..self.layers {
            for (from, to, shape, interleaved) in [
                ("attn_norm", "input_layernorm", vec![hidden], None),
                ("attn_q", "self_attn.q_proj", vec![q, hidden], Some(head)),
                ("attn_k", "self_attn.k_proj", vec![kv, hidden], Some(head)),
                ("attn_v", "self_attn.v_proj", vec![kv, hidden], None),
                ("attn_output", "self_attn.o_proj", vec![hidden, q], None),
                ("ffn_norm", "post_attention_layernorm", vec![hidden], None),
                ("ffn_gate", "mlp.gate_proj", vec![ffn, hidden], None),
                ("ffn_up", "mlp.up_proj", vec![ffn, hidden], None),
                ("ffn_down", "mlp.down_proj", vec![hidden, ffn], None),
            ] {
                let names =
                    (format!("blk.{layer}.{from}.weight"), format!("model.layers.{layer}.{to}.weight"));
                wanted.push((names.0, names.1, shape, interleaved));
            }
        }
        wanted.push(("output_norm.weight".to_owned(), "model.norm.weight".to_owned(), vec![hidden], None));
        if !self.tied_embeddings {
            wanted.push((
                "output.weight".to_owned(),
                "lm_head.weight".to_owned(),
                vec![self.vocab, hidden],
                None,
            ));
        }

        let mut plans = Vec::with_capacity(wanted.len());
        for (from, name, shape, interleaved_head) in wanted {
            let source = find(gguf, &from)?;
            let expected = shape.split_last().map(|(row, outer)| (shape.len(), outer.iter().product(), *row));
            if Some((source.dimensions, source.rows, source.row_elements)) != expected {
                let found = format!("{} x {}", source.rows, source.row_elements);
                return Err(gguf.error(format!("tensor {from} is {found}, the metadata asks for {shape:?}")));
            }
            plans.push(TensorPlan { source, name, shape, interleaved_head });
        }
        let known = |tensor: &&GgufTensor| {
            tensor.name == ROPE_FREQS || plans.iter().any(|plan| plan.source.name == tensor.name)
        };
        if let Some(other) = gguf.tensors().iter().find(|tensor| !known(tensor)) {
            return Err(gguf.error(format!("tensor {} has no place in a Llama checkpoint", other.name)));
        }
        Ok(plans)
    }

    /// config.json, with the ids of the tokens that begin and end a text.
    pub(super) fn config(&self, bos: Option<u32>, eos: &[u32]) -> Json {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": bos,
            "eos_token_id": eos_json(eos),
            "rope_theta": self.rope_theta,
            "rope_scaling": null,
            "torch_dtype": "bfloat16",
        });
        if let Some(scaling) = self.rope_scaling {
            config["rope_scaling"] = json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            });
        }
        config
    }
}

/// One id as a number, several as a list.
pub(super) fn eos_json(ids: &[u32]) -> Json {
    match ids {
        [] => Json::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

/// llama.cpp stores the rows of a q or k head interleaved (0, d/2, 1, d/2 + 1, ...) for its rotation of neighbours; Hugging
/// Face rotates the two halves against each other. The row of the GGUF tensor that is row `row` of the checkpoint.
pub(super) fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, row) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (row % half) + row / half
}

fn find<'a>(gguf: &'a Gguf, name: &str) -> Result<&'a GgufTensor, ConvertError> {
    gguf.tensors()
        .iter()
        .find(|tensor| tensor.name == name)
        .ok_or_else(|| gguf.error(format!("tensor {name} is missing")))
}

fn read_rope_scaling(
    gguf: &Gguf,
    theta: f64,
    head_dim: usize,
) -> Result<Option<Llama3Scaling>, ConvertError> {
    let Some(tensor) = gguf.tensors().iter().find(|tensor| tensor.name == ROPE_FREQS) else {
        return Ok(None);
    };
    if tensor.ty != super::ggml_type::GgmlType::F32 || tensor.rows != 1 || tensor.row_elements != head_dim / 2
    {
        return Err(gguf.error(format!("tensor {ROPE_FREQS} is not {} F32 values", head_dim / 2)));
    }
    let mut bytes = vec![0; tensor.row_bytes()];
    gguf.read_rows(tensor, 0, &mut bytes)?;
    let factors: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let one = 1f32.to_le_bytes();
    if bytes.chunks_exact(4).all(|factor| factor == one) {
        return Ok(None);
    }
    let scaling = Llama3Scaling::fit(&factors, theta);
    scaling.map(Some).ok_or_else(|| gguf.error(format!("tensor {ROPE_FREQS} holds no llama3 RoPE scaling")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The permutation of llama.cpp's convert script, written out for two heads of 6.
    #[test]
    fn undoes_the_row_permutation() {
        let head = 6;
        // reshape(heads, 2, d/2).swapaxes(1, 2): checkpoint row h*6 + i*3 + j goes to h*6 + j*2 + i.
        let mut permuted = [0; 12];
        for (h, i, j) in (0..2).flat_map(|h| (0..2).flat_map(move |i| (0..3).map(move |j| (h, i, j)))) {
            permuted[h * 6 + j * 2 + i] = h * 6 + i * 3 + j;
        }
        assert_eq!(&permuted[..6], [0, 3, 1, 4, 2, 5]);
        let restored: Vec<usize> = (0..12).map(|row| permuted[interleaved_row(row, head)]).collect();
        assert_eq!(restored, (0..12).collect::<Vec<_>>());
    }
}
