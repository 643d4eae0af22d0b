//! GGUF to a bf16 checkpoint.

use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use super::gguf::{Gguf, GgufTensor};
use super::llama::{Llama, TensorPlan, eos_json, interleaved_row};
use super::output::{FileSum, OutputDirectory};
use super::safetensors_file::{SafetensorsWriter, TensorSpec};
use super::tokenizer::Tokenizer;
use super::{ConvertError, Progress};

/// A checkpoint is split into files of at most this many bytes (or one tensor), as Hugging Face does it.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Bytes of bf16 converted at a time, about.
const CHUNK_BYTES: usize = 8 << 20;

/// Imports a GGUF file of the `llama` architecture as a bf16 checkpoint: `config.json`, `generation_config.json`,
/// `tokenizer.json`, `tokenizer_config.json`, safetensors and checksums in the new directory `out`.
///
/// Values are computed in f32 by the formulas of their GGUF type and rounded to the nearest bf16, ties to even.
/// `force` lets it replace a model directory.
pub fn import_gguf(
    gguf: &Path,
    out: &Path,
    force: bool,
    progress: &dyn Progress,
) -> Result<Vec<FileSum>, ConvertError> {
    let gguf = Gguf::open(gguf)?;
    let llama = Llama::read(&gguf)?;
    let plans = llama.tensors(&gguf)?;
    let tokenizer = Tokenizer::read(&gguf, llama.vocab)?;

    let output = OutputDirectory::create(out, force)?;
    let (bos, eos) = (tokenizer.bos, tokenizer.eos.as_slice());
    output.write("config.json", &pretty(&llama.config(bos, eos)))?;
    let mut generation = json!({"bos_token_id": bos, "eos_token_id": eos_json(eos)});
    if let Some(pad) = tokenizer.pad {
        generation["pad_token_id"] = json!(pad);
    }
    output.write("generation_config.json", &pretty(&generation))?;
    output.write("tokenizer.json", &pretty(&tokenizer.tokenizer_json()))?;
    output.write("tokenizer_config.json", &pretty(&tokenizer.tokenizer_config(llama.context)))?;

    let shards = split(&plans, SHARD_BYTES);
    progress.stage("tensors", plans.iter().map(|plan| spec(plan).bytes()).sum());
    for (index, plans) in shards.iter().enumerate() {
        let file = output.file(&shard_name(index, shards.len()));
        let writer = SafetensorsWriter::create(&file, plans.iter().map(spec).collect())?;
        for plan in *plans {
            import_tensor(&gguf, plan, &writer, progress)?;
        }
    }
    if shards.len() > 1 {
        output.write("model.safetensors.index.json", &pretty(&index(&shards)))?;
    }
    output.commit(progress)
}

/// Reads of a GGUF file in memory all that an import reads of it, but its weights.
pub(crate) fn read_gguf(bytes: &[u8]) -> Result<(), ConvertError> {
    let gguf = Gguf::of_bytes(bytes)?;
    let llama = Llama::read(&gguf)?;
    llama.tensors(&gguf)?;
    let tokenizer = Tokenizer::read(&gguf, llama.vocab)?;
    llama.config(tokenizer.bos, &tokenizer.eos);
    tokenizer.tokenizer_json();
    Ok(())
}

fn import_tensor(
    gguf: &Gguf,
    plan: &TensorPlan<'_>,
    writer: &SafetensorsWriter,
    progress: &dyn Progress,
) -> Result<(), ConvertError> {
    let read = |first, encoded: &mut [u8]| gguf.read_rows(plan.source, first, encoded);
    let write = |first: usize, decoded: Option<&[u8]>| {
        let Some(decoded) = decoded else {
            return Err(gguf.error(format!("tensor {} holds values that are not finite", plan.source.name)));
        };
        writer.write(&plan.name, (first * 2 * plan.source.row_elements) as u64, decoded)?;
        progress.advance(decoded.len() as u64);
        Ok(())
    };
    decode_rows(plan.source, plan.interleaved_head, CHUNK_BYTES, read, write)
}

/// Decodes a tensor to bf16, a chunk of rows at a time: `read(first row, encoded)` fills in the rows as they are stored,
/// `write(first row, decoded)` takes them in checkpoint order, or nothing when a value is not finite.
fn decode_rows<E>(
    tensor: &GgufTensor,
    interleaved_head: Option<usize>,
    chunk_bytes: usize,
    mut read: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    mut write: impl FnMut(usize, Option<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    // Rows that move stay within their head: a chunk is whole heads.
    let unit = interleaved_head.unwrap_or(1);
    let (source_row, target_row) = (tensor.row_bytes(), 2 * tensor.row_elements);
    let chunk_rows = (chunk_bytes / target_row / unit).max(1) * unit;
    let mut encoded = vec![0; chunk_rows.min(tensor.rows) * source_row];
    let mut decoded = vec![0; chunk_rows.min(tensor.rows) * target_row];
    for first in (0..tensor.rows).step_by(chunk_rows) {
        let rows = chunk_rows.min(tensor.rows - first);
        let encoded = &mut encoded[..rows * source_row];
        let decoded = &mut decoded[..rows * target_row];
        read(first, encoded)?;
        let finite = decoded.par_chunks_exact_mut(target_row).enumerate().all(|(row, target)| {
            let from = interleaved_head.map_or(row, |head| interleaved_row(row, head));
            tensor.ty.decode_to_bf16(&encoded[from * source_row..][..source_row], target)
        });
        write(first, finite.then_some(decoded))?;
    }
    Ok(())
}

fn spec(plan: &TensorPlan<'_>) -> TensorSpec {
    TensorSpec { name: plan.name.clone(), dtype: Dtype::BF16, shape: plan.shape.clone() }
}

/// Cuts the list of tensors where the next one would make a file larger than `most` bytes.
fn split<'a, 'b>(plans: &'b [TensorPlan<'a>], most: u64) -> Vec<&'b [TensorPlan<'a>]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (end, plan) in plans.iter().enumerate() {
        let size = spec(plan).bytes();
        if bytes + size > most && end > start {
            shards.push(&plans[start..end]);
            (start, bytes) = (end, 0);
        }
        bytes += size;
    }
    shards.push(&plans[start..]);
    shards
}

fn shard_name(index: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

fn index(shards: &[&[TensorPlan<'_>]]) -> Json {
    let mut weight_map = serde_json::Map::new();
    let mut total = 0;
    for (index, plans) in shards.iter().enumerate() {
        for plan in *plans {
            weight_map.insert(plan.name.clone(), json!(shard_name(index, shards.len())));
            total += spec(plan).bytes();
        }
    }
    json!({"metadata": {"total_size": total}, "weight_map": weight_map})
}

/// JSON as a person would read it, with a newline at the end.
pub(super) fn pretty(value: &Json) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::super::ggml_type::GgmlType;
    use super::*;

    /// 3 heads of 6 rows: the chunks hold less than a head, one head, two heads, and everything.
    #[test]
    fn chunks_make_no_difference() {
        let tensor = GgufTensor {
            name: "blk.0.attn_q.weight".into(),
            ty: GgmlType::Bf16,
            rows: 18,
            row_elements: 1,
            dimensions: 2,
            offset: 0,
        };
        let stored: Vec<u8> = (0..36).collect();
        let decode = |interleaved_head, chunk_bytes| {
            let mut decoded = vec![0; 36];
            let read = |first: usize, encoded: &mut [u8]| {
                encoded.copy_from_slice(&stored[2 * first..][..encoded.len()]);
                Ok::<_, Infallible>(())
            };
            let write = |first: usize, rows: Option<&[u8]>| {
                let rows = rows.unwrap();
                decoded[2 * first..][..rows.len()].copy_from_slice(rows);
                Ok(())
            };
            decode_rows(&tensor, interleaved_head, chunk_bytes, read, write).unwrap();
            decoded
        };
        for chunk_bytes in [1, 10, 12, 14, 24, 1000] {
            assert_eq!(decode(None, chunk_bytes), stored);
            let decoded = decode(Some(6), chunk_bytes);
            let rows: Vec<u8> = decoded.chunks_exact(2).map(|row| row[0] / 2).collect();
            assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11, 12, 14, 16, 13, 15, 17], "{chunk_bytes}");
        }
    }

    #[test]
    fn splits_into_files_of_bounded_size() {
        let source = |rows| GgufTensor {
            name: String::new(),
            ty: GgmlType::F32,
            rows,
            row_elements: 1,
            dimensions: 2,
            offset: 0,
        };
        let sources: Vec<GgufTensor> = [3, 3, 9, 1, 4].map(source).into();
        let plans: Vec<TensorPlan<'_>> = sources
            .iter()
            .enumerate()
            .map(|(i, source)| TensorPlan {
                source,
                name: format!("t{i}"),
                shape: vec![source.rows, 1],
                interleaved_head: None,
            })
            .collect();
        let shards = split(&plans, 2 * 6);
        let sizes: Vec<usize> = shards.iter().map(|shard| shard.len()).collect();
        assert_eq!(sizes, [2, 1, 2]);
        let index = index(&shards);
        assert_eq!(index["metadata"]["total_size"], 2 * 20);
        assert_eq!(index["weight_map"]["t2"], "model-00002-of-00003.safetensors");
        assert_eq!(split(&plans, 1000).len(), 1);
    }
}
