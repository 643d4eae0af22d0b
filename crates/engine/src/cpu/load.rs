//! From a checkpoint to the weights of one rank: reads its slices, checks them, packs them.

use std::ops::Range;

use half::{bf16, f16};
use herd_model::{Fp8, InputScales, Linear, ModelConfig, RankShard, WeightScales};
use rayon::prelude::*;

use super::e4m3;
use super::linear::{Part, PartFormat, Projection};
use super::memory::Arena;
use super::packed::{Format, Packer};
use super::rank::{LayerWeights, OutputWeights, Weights};
use crate::checkpoint::{Checkpoint, CheckpointError, Stored, Tensor};
use crate::clipped::RowsClipped;
use crate::convert::quantize_row;

/// Formats that are no quantization. f16 is widened to f32: every f16 value is one, bf16 would lose three of its bits, and
/// another kernel is not worth it while nearly all checkpoints are bf16. It takes twice the memory of the file.
pub(super) const PLAIN: [Stored; 3] = [Stored::BF16, Stored::F16, Stored::F32];
/// Formats of scales.
const SCALES: [Stored; 2] = [Stored::F32, Stored::BF16];
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Bytes of rows read at once.
const READ_BYTES: usize = 1 << 20;

/// Reads and packs what one rank holds.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) shard: &'a RankShard,
    pub(super) clipped: &'a RowsClipped,
    /// Of the packed weights.
    pub(super) arena: &'a Arena,
}

/// Outputs and inputs of a weight that a rank holds.
struct Slice<'a> {
    weight: Tensor<'a>,
    /// Of FP8.
    scales: Option<Scales<'a>>,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// Scales of a weight in FP8, and of its inputs where they are stored.
struct Scales<'a> {
    weight: Tensor<'a>,
    per: WeightScales,
    input: Option<f32>,
}

impl Slice<'_> {
    /// Whether outputs of both can stand in one part.
    fn is_like(&self, other: &Self) -> bool {
        let input = |slice: &Self| slice.scales.as_ref().and_then(|scales| scales.input).map(f32::to_bits);
        self.weight.dtype() == other.weight.dtype() && input(self) == input(other)
    }

    /// Reads it, a few rows at a time.
    fn for_each_row(
        &self,
        mut visit: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let Self { weight, scales: _, rows, columns } = self;
        let row_bytes = columns.len() * weight.element();
        let at_once = (READ_BYTES / row_bytes.max(1)).max(1);
        let mut bytes = Vec::new();
        for from in rows.clone().step_by(at_once) {
            weight.read(from..rows.end.min(from + at_once), columns.clone(), &mut bytes)?;
            bytes.chunks_exact(row_bytes).try_for_each(&mut visit)?;
        }
        Ok(())
    }
}

impl Loader<'_> {
    pub(super) fn weights(&self) -> Result<Weights, CheckpointError> {
        let &ModelConfig { layers, tied_embeddings, .. } = self.config();
        let is_last = self.shard.layers.end == layers;
        let head = if tied_embeddings { EMBEDDING } else { "lm_head.weight" };
        let output = || -> Result<_, CheckpointError> {
            Ok(OutputWeights {
                norm: self.norm("model.norm.weight")?,
                head: Projection::new(self.vocabulary(head)?, vec![], self.clipped.clone()),
            })
        };
        let embedding = || self.vocabulary(EMBEDDING).map(|part| part.packed);
        let has_embedding = self.shard.stage == 0 && !(tied_embeddings && is_last);
        Ok(Weights {
            embedding: has_embedding.then(embedding).transpose()?,
            layers: self.layers()?,
            output: is_last.then(output).transpose()?,
        })
    }

    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// All threads of the rank read and pack layers.
    fn layers(&self) -> Result<Vec<LayerWeights>, CheckpointError> {
        let layers = self.shard.layers.clone();
        match rayon::current_thread_index() {
            Some(_) => layers.into_par_iter().map(|layer| self.layer(layer)).collect(),
            None => layers.map(|layer| self.layer(layer)).collect(),
        }
    }

    pub(super) fn layer(&self, layer: usize) -> Result<LayerWeights, CheckpointError> {
        Ok(LayerWeights {
            attention_norm: self.norm(&format!("model.layers.{layer}.input_layernorm.weight"))?,
            qkv: self.projection(layer, Linear::Query, &[Linear::Key, Linear::Value])?,
            output: self.projection(layer, Linear::Output, &[])?,
            ffn_norm: self.norm(&format!("model.layers.{layer}.post_attention_layernorm.weight"))?,
            gate_up: self.projection(layer, Linear::Gate, &[Linear::Up])?,
            down: self.projection(layer, Linear::Down, &[])?,
        })
    }

    fn norm(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let width = self.config().hidden_size;
        let tensor = self.checkpoint.tensor(name, &PLAIN, &[width])?;
        read_f32(tensor, 0..width)
    }

    fn vocabulary(&self, name: &str) -> Result<Part, CheckpointError> {
        let &ModelConfig { vocab_size, hidden_size, .. } = self.config();
        let weight = self.checkpoint.tensor(name, &PLAIN, &[vocab_size, hidden_size])?;
        pack(
            &[Slice { weight, scales: None, rows: self.shard.vocab.clone(), columns: 0..hidden_size }],
            self.arena,
        )
    }

    /// Linears of the same input. Neighbours that are stored alike become one.
    pub(super) fn projection(
        &self,
        layer: usize,
        first: Linear,
        others: &[Linear],
    ) -> Result<Projection, CheckpointError> {
        let names: Vec<_> = std::iter::once(first)
            .chain(others.iter().copied())
            .map(|linear| {
                let module = linear.module(layer);
                (linear, ["weight", "weight_scale", "input_scale"].map(|part| format!("{module}.{part}")))
            })
            .collect();
        let slices = names
            .iter()
            .map(|(linear, names)| self.linear(layer, *linear, names))
            .collect::<Result<Vec<_>, _>>()?;
        let mut alike = slices.chunk_by(Slice::is_like);
        let first = pack(alike.next().unwrap_or_default(), self.arena)?;
        let others = alike.map(|slices| pack(slices, self.arena)).collect::<Result<_, _>>()?;
        Ok(Projection::new(first, others, self.clipped.clone()))
    }

    /// A linear that is not quantized, as it is stored.
    pub(super) fn plain(&self, layer: usize, linear: Linear) -> Result<Projection, CheckpointError> {
        let name = format!("{}.weight", linear.module(layer));
        let part = pack(&[self.plain_slice(linear, &name)?], &Arena::default())?;
        Ok(Projection::new(part, vec![], self.clipped.clone()))
    }

    /// The same as quantizing it makes it, and the largest magnitude of a weight.
    pub(super) fn quantized(
        &self,
        layer: usize,
        linear: Linear,
    ) -> Result<(Projection, f32), CheckpointError> {
        let name = format!("{}.weight", linear.module(layer));
        let slice = self.plain_slice(linear, &name)?;
        let inputs = slice.columns.len();
        let mut packer = Packer::new(slice.rows.len(), inputs, Format::E4m3, &Arena::default());
        let (mut scales, mut codes) = (Vec::with_capacity(slice.rows.len()), vec![0; inputs]);
        slice.for_each_row(|row| {
            let Some(scale) = quantize_row(slice.weight.dtype(), row, &mut codes) else {
                return Err(slice.weight.bad("holds values that are not finite".to_owned()));
            };
            packer.push(&codes);
            scales.push(scale);
            Ok(())
        })?;
        let largest = scales.iter().fold(0.0_f32, |largest, scale| largest.max(scale * e4m3::MAX));
        let format = PartFormat::Fp8 { scales, input_scale: None };
        let part = Part { packed: packer.finish(), format };
        Ok((Projection::new(part, vec![], self.clipped.clone()), largest))
    }

    fn plain_slice<'a>(&'a self, linear: Linear, name: &'a str) -> Result<Slice<'a>, CheckpointError> {
        let [rows, columns] = linear.slice(self.config(), self.shard);
        let weight = self.checkpoint.tensor(name, &PLAIN, &linear.shape(self.config()))?;
        Ok(Slice { weight, scales: None, rows, columns })
    }

    fn linear<'a>(
        &'a self,
        layer: usize,
        linear: Linear,
        [weight, weight_scale, input_scale]: &'a [String; 3],
    ) -> Result<Slice<'a>, CheckpointError> {
        let config = self.config();
        let shape = linear.shape(config);
        let [rows, columns] = linear.slice(config, self.shard);
        let fp8 = config.quantization.as_ref().filter(|_| linear.is_fp8(config, layer));
        let Some(Fp8 { weight_scales, input_scales, kept: _ }) = fp8 else {
            return self.plain_slice(linear, weight);
        };
        let weight = self.checkpoint.tensor(weight, &[Stored::F8_E4M3], &shape)?;
        let scale = match weight_scales {
            WeightScales::PerOutput => self.checkpoint.tensor(weight_scale, &SCALES, &[shape[0], 1])?,
            WeightScales::PerTensor => self.checkpoint.scalar(weight_scale, &SCALES)?,
        };
        let input = match input_scales {
            InputScales::PerToken { bound: _ } => None,
            InputScales::Stored => {
                let input = self.checkpoint.scalar(input_scale, &SCALES)?;
                read_scales(input, 0..1)?.first().copied()
            }
        };
        let scales = Some(Scales { weight: scale, per: *weight_scales, input });
        Ok(Slice { weight, scales, rows, columns })
    }
}

/// Packs slices of one stored format and the same columns, one after the other.
fn pack(slices: &[Slice<'_>], arena: &Arena) -> Result<Part, CheckpointError> {
    let outputs = slices.iter().map(|slice| slice.rows.len()).sum();
    let inputs = slices.first().map_or(0, |slice| slice.columns.len());
    let stored = slices.first().map_or(Stored::BF16, |slice| slice.weight.dtype());
    let format = match stored {
        Stored::F8_E4M3 => Format::E4m3,
        Stored::F16 | Stored::F32 => Format::F32,
        _ => Format::Bf16,
    };
    let mut packer = Packer::new(outputs, inputs, format, arena);
    let (mut output_scales, mut input_scale) = (Vec::new(), None);
    for slice in slices {
        slice.for_each_row(|row| {
            match stored {
                Stored::F16 => packer.push(&widen(row)),
                Stored::F8_E4M3 if row.iter().any(|code| code & 0x7f == 0x7f) => {
                    return Err(slice.weight.bad("has weights that are not numbers".to_owned()));
                }
                _ => packer.push(row),
            }
            Ok(())
        })?;
        let Slice { weight: _, scales, rows, columns: _ } = slice;
        if let Some(Scales { weight, per, input }) = scales {
            input_scale = *input;
            output_scales.extend(match per {
                WeightScales::PerOutput => read_scales(*weight, rows.clone())?,
                WeightScales::PerTensor => read_scales(*weight, 0..1)?.repeat(rows.len()),
            });
        }
    }
    let format = match format {
        Format::Bf16 => PartFormat::Bf16,
        Format::F32 => PartFormat::F32,
        Format::E4m3 => PartFormat::Fp8 { scales: output_scales, input_scale },
    };
    Ok(Part { packed: packer.finish(), format })
}

fn widen(row: &[u8]) -> Vec<u8> {
    row.as_chunks().0.iter().flat_map(|&half| f16::from_le_bytes(half).to_f32().to_le_bytes()).collect()
}

/// Scales, which are numbers that something can be multiplied with and divided by.
fn read_scales(tensor: Tensor<'_>, rows: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    let scales = read_f32(tensor, rows.clone())?;
    match rows.zip(&scales).find(|(_, scale)| !(scale.is_finite() && **scale > 0.0)) {
        Some((row, scale)) => {
            Err(tensor.bad(format!("is {scale} in row {row}; a scale is a number above 0")))
        }
        None => Ok(scales),
    }
}

/// Rows of a tensor of one column.
fn read_f32(tensor: Tensor<'_>, rows: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    let mut bytes = Vec::new();
    tensor.read(rows, 0..1, &mut bytes)?;
    Ok(to_f32(tensor.dtype(), &bytes))
}

/// Numbers in one of [`PLAIN`].
pub(super) fn to_f32(stored: Stored, bytes: &[u8]) -> Vec<f32> {
    match stored {
        Stored::F32 => bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Stored::F16 => bytes.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
    }
}
