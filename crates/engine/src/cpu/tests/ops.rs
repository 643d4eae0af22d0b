//! Single operations against torch: exactly where the arithmetic is fixed to the bit.

use herd_model::{Dtype, Llama3Scaling, ModelConfig, Rope};
use herd_scheduler::{LogitRows, SequenceId, StepEntry, StepPlan};

use super::{Golden, largest_difference};
use crate::clipped::RowsClipped;
use crate::cpu::batch::Batch;
use crate::cpu::e4m3;
use crate::cpu::elementwise::rms_norm;
use crate::cpu::isa::Isa;
use crate::cpu::linear::{LinearWork, Numerics, Part, PartFormat, Projection, activation_scale};
use crate::cpu::memory::Arena;
use crate::cpu::packed::{Format, Packer};

#[test]
fn every_e4m3_code_decodes_exactly() {
    let golden = Golden::open("ops/ops.safetensors").f32("e4m3/decode");
    for (code, expected) in (0..=255_u8).zip(golden) {
        let decoded = e4m3::decode(code);
        if code & 0x7f == 0x7f {
            // The two codes that are no number; the reference file has 0 in their place.
            assert!(decoded.is_nan());
        } else {
            assert_eq!(decoded.to_bits(), expected.to_bits(), "code {code:#x}");
        }
    }
}

#[test]
fn casts_round_to_nearest_even_and_saturate() {
    let golden = Golden::open("ops/ops.safetensors");
    let values = golden.f32("e4m3/cast_in");
    let codes = golden.bytes("e4m3/cast_out_codes");
    assert_eq!(values.len(), codes.len());
    for (value, code) in values.into_iter().zip(codes) {
        assert_eq!(e4m3::encode(value), code, "{value}");
    }
}

#[test]
fn fp8_linear_has_the_references_scales_codes_and_products() {
    let golden = Golden::open("ops/ops.safetensors");
    let x = golden.f32("linear/x");
    let weights = golden.bytes("linear/weight_fp8");
    for (rule, bound) in [("fbgemm", 1200.0), ("fbgemm_ub2", 2.0), ("dynamic_per_token", f32::INFINITY)] {
        let scales = golden.f32(&format!("linear/{rule}/x_scale"));
        let codes = golden.bytes(&format!("linear/{rule}/x_codes"));
        for ((row, scale), codes) in x.chunks_exact(256).zip(&scales).zip(codes.chunks_exact(256)) {
            let largest = row.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            assert_eq!(activation_scale(largest, bound).to_bits(), scale.to_bits(), "{rule}");
            let own: Vec<_> = row.iter().map(|x| e4m3::encode(x / scale)).collect();
            assert_eq!(own, codes, "{rule}");
        }

        let mut packer = Packer::new(48, 256, Format::E4m3, &Arena::default());
        weights.chunks_exact(256).for_each(|row| packer.push(row));
        let format = PartFormat::Fp8 { scales: golden.f32("linear/weight_scale"), input_scale: None };
        let clipped = RowsClipped::default();
        let linear = Projection::new(Part { packed: packer.finish(), format }, vec![], clipped.clone());
        let above = x.chunks_exact(256).filter(|row| row.iter().any(|x| x.abs() > bound)).count() as u64;
        assert_eq!(above > 0, rule != "dynamic_per_token", "{rule} clips {above} rows");
        for (turn, isa) in (1..).zip(Isa::all()) {
            let numerics = Numerics { isa, dtype: Dtype::F32, activation_scale_ub: bound };
            let y = forward(&linear, numerics, &x);
            let expected = golden.f32(&format!("linear/{rule}/y"));
            for (row, (y, expected)) in y.chunks_exact(48).zip(expected.chunks_exact(48)).enumerate() {
                let size = expected.iter().fold(0.0, |size: f32, y| size.max(y.abs()));
                let error = largest_difference(y, expected);
                assert!(error <= 1e-5 * size, "{rule} row {row}: {error} of {size}");
            }
            assert_eq!(clipped.get(), turn * above, "{rule}");
        }
    }
}

fn forward(linear: &Projection, numerics: Numerics, x: &[f32]) -> Vec<f32> {
    let mut y = Vec::new();
    linear.forward(numerics, x, None, &mut LinearWork::default(), &mut y).unwrap();
    y
}

#[test]
fn stored_input_scales_are_those_of_their_own_linear() {
    let golden = Golden::open("ops/ops.safetensors");
    let x = golden.f32("linear/x");
    let codes = golden.bytes("linear/weight_fp8");
    // Two linears of the same input: scales of the weight, and of the input. The second clips.
    let linears = [(0.5, 0.25), (2.0, 1.0 / 512.0)];
    let mut parts = linears.map(|(weight_scale, input_scale)| {
        let mut packer = Packer::new(48, 256, Format::E4m3, &Arena::default());
        codes.chunks_exact(256).for_each(|row| packer.push(row));
        let format = PartFormat::Fp8 { scales: vec![weight_scale; 48], input_scale: Some(input_scale) };
        Part { packed: packer.finish(), format }
    });
    parts.reverse();
    let [second, first] = parts;
    let clipped = RowsClipped::default();
    let linear = Projection::new(first, vec![second], clipped.clone());
    let numerics = Numerics { isa: Isa::detect(), dtype: Dtype::F32, activation_scale_ub: f32::INFINITY };
    let y = forward(&linear, numerics, &x);
    let mut above = 0;
    for (row, (x, y)) in x.chunks_exact(256).zip(y.chunks_exact(96)).enumerate() {
        for ((weight_scale, input_scale), y) in linears.into_iter().zip(y.chunks_exact(48)) {
            let quantized: Vec<f64> =
                x.iter().map(|x| f64::from(e4m3::decode(e4m3::encode(x / input_scale)))).collect();
            above += u64::from(x.iter().any(|x| x.abs() > 448.0 * input_scale));
            let expected: Vec<f32> = codes
                .chunks_exact(256)
                .map(|codes| {
                    let dot: f64 = codes
                        .iter()
                        .zip(&quantized)
                        .map(|(code, x)| f64::from(e4m3::decode(*code)) * x)
                        .sum();
                    (dot * f64::from(weight_scale * input_scale)) as f32
                })
                .collect();
            let size = expected.iter().fold(0.0, |size: f32, y| size.max(y.abs()));
            let error = largest_difference(y, &expected);
            assert!(error <= 1e-5 * size, "row {row}: {error} of {size}");
        }
    }
    assert!(above > 0);
    assert_eq!(clipped.get(), above);
}

#[test]
fn rms_norm_agrees() {
    let golden = Golden::open("ops/ops.safetensors");
    let x = golden.f32("rmsnorm/x");
    let expected = golden.f32("rmsnorm/y_eps1e-5");
    for isa in Isa::all() {
        let mut y = vec![0.0; x.len()];
        rms_norm(isa, &x, &golden.bf16("rmsnorm/weight"), 1e-5, &mut y);
        for (row, (y, expected)) in y.chunks_exact(256).zip(expected.chunks_exact(256)).enumerate() {
            let size = expected.iter().fold(0.0, |size: f32, y| size.max(y.abs()));
            let error = largest_difference(y, expected);
            assert!(error <= 1e-6 * size, "row {row}: {error} of {size}");
        }
    }
}

#[test]
fn rotations_agree_up_to_position_131071() {
    let golden = Golden::open("ops/ops.safetensors");
    let positions = golden.bytes("rope/positions");
    let positions: Vec<_> =
        positions.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes) as usize).collect();
    let llama3 = |factor| {
        Some(Llama3Scaling { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 })
    };
    for (name, theta, scaling, head_dim) in [
        ("llama3", 500_000.0, None, 128),
        ("llama3.1", 500_000.0, llama3(8.0), 128),
        ("llama3.2-1b", 500_000.0, llama3(32.0), 64),
        ("llama3.2-3b", 500_000.0, llama3(32.0), 128),
        ("smollm2", 100_000.0, None, 64),
    ] {
        let frequencies = Rope { theta, scaling }.inverse_frequencies(head_dim);
        let expected = golden.f32(&format!("rope/{name}/inv_freq"));
        let ulps: Vec<_> =
            frequencies.iter().zip(&expected).map(|(a, b)| a.to_bits().abs_diff(b.to_bits())).collect();
        assert!(ulps.iter().all(|&ulps| ulps == 0), "{name}: {ulps:?} units in the last place");

        let (cos, sin) = (golden.f32(&format!("rope/{name}/cos")), golden.f32(&format!("rope/{name}/sin")));
        let half = head_dim / 2;
        for ((position, cos), sin) in positions.iter().zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half))
        {
            let batch = one_token_at(*position, &frequencies);
            assert!(largest_difference(&batch.cos, cos) <= 1e-6, "{name} at {position}");
            assert!(largest_difference(&batch.sin, sin) <= 1e-6, "{name} at {position}");
        }
    }
}

fn one_token_at(position: usize, frequencies: &[f32]) -> Batch {
    let config = br#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}"#;
    let config = ModelConfig::from_json(config, None).unwrap();
    let plan = StepPlan {
        moves: vec![],
        entries: vec![StepEntry {
            sequence: SequenceId(0),
            tokens: vec![1],
            start: position,
            blocks: (0..2048).collect(),
            logits: LogitRows::None,
        }],
    };
    Batch::new(&plan, &config, frequencies, (2048, 0)).unwrap()
}
