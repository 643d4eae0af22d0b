//! Kernels give the same bits for a row whatever stands beside it.

use proptest::prelude::*;

use super::largest_difference;
use crate::cpu::isa::{Isa, LANES};
use crate::cpu::memory::Arena;
use crate::cpu::packed::{Format, Packed, Packer, Rows, padded};

fn packed(outputs: usize, inputs: usize, format: Format, seed: u64) -> (Packed, Vec<f32>) {
    let mut packer = Packer::new(outputs, inputs, format, &Arena::default());
    let mut plain = Vec::new();
    for output in 0..outputs {
        let values: Vec<f32> =
            (0..inputs).map(|input| noise(seed, (output * inputs + input) as u64)).collect();
        let mut row = Vec::new();
        for value in values {
            let stored = match format {
                Format::Bf16 => {
                    let value = half::bf16::from_f32(value);
                    row.extend(value.to_le_bytes());
                    value.to_f32()
                }
                Format::F32 => {
                    row.extend(value.to_le_bytes());
                    value
                }
                Format::E4m3 => {
                    let code = crate::cpu::e4m3::encode(value);
                    row.push(code);
                    crate::cpu::e4m3::decode(code)
                }
            };
            plain.push(stored);
        }
        packer.push(&row);
    }
    (packer.finish(), plain)
}

fn multiply(packed: &Packed, isa: Isa, x: &[f32], bf16: bool) -> Vec<f32> {
    let inputs = packed.inputs();
    let count = x.len() / inputs;
    let mut wide = vec![0.0; count * padded(inputs)];
    for (wide, x) in wide.chunks_exact_mut(padded(inputs)).zip(x.chunks_exact(inputs)) {
        wide[..inputs].copy_from_slice(x);
    }
    let bits: Vec<u16> = wide.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
    let mut out = vec![0.0; packed.panels() * count * LANES];
    packed.multiply(isa, if bf16 { Rows::Bf16(&bits) } else { Rows::F32(&wide) }, count, &mut out);
    out
}

/// In -1..1; a mix of the two numbers (the finalizer of `MurmurHash3`).
fn noise(seed: u64, index: u64) -> f32 {
    let mut bits = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index;
    for _ in 0..2 {
        bits = (bits ^ bits >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    }
    (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn one_row_or_many(
        rows in 1_usize..70,
        outputs in 1_usize..150,
        inputs in 1_usize..200,
        format in prop_oneof![Just(Format::Bf16), Just(Format::F32), Just(Format::E4m3)],
        seed: u64,
        pooled: bool,
    ) {
        let (packed, plain) = packed(outputs, inputs, format, seed);
        // Numbers of bf16, so that both kinds of rows hold the same.
        let x: Vec<f32> = (0..rows * inputs)
            .map(|index| half::bf16::from_f32(noise(!seed, index as u64)).to_f32())
            .collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for isa in Isa::all() {
            for bf16 in [false, true] {
                if bf16 && (format == Format::F32 || !isa.has_bf16()) {
                    continue;
                }
                let multiply = |x: &[f32]| multiply(&packed, isa, x, bf16);
                let many = if pooled { pool.install(|| multiply(&x)) } else { multiply(&x) };
                for (row, x) in x.chunks_exact(inputs).enumerate() {
                    let one = multiply(x);
                    for output in 0..outputs {
                        let (panel, lane) = (output / LANES, output % LANES);
                        let y = many[(panel * rows + row) * LANES + lane];
                        prop_assert_eq!(y.to_bits(), one[panel * LANES + lane].to_bits());
                        let weights = &plain[output * inputs..][..inputs];
                        let exact: f64 =
                            weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        prop_assert!((f64::from(y) - exact).abs() < 1e-4, "{} is not {}", y, exact);
                    }
                }
            }
        }
        let mut weights = vec![0.0; inputs];
        packed.read_output(outputs - 1, &mut weights);
        prop_assert!(largest_difference(&weights, &plain[(outputs - 1) * inputs..]) == 0.0);
    }
}
