//! The kernels and single layers against the reference, and against themselves: one row or many give the same bits.

mod bits;
mod layer_step;
mod ops;
mod scales;
mod sparse;

use std::path::PathBuf;

use safetensors::SafeTensors;

/// Reference data in the project.
fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

/// A file of named tensors.
struct Golden(Vec<u8>);

impl Golden {
    fn open(path: &str) -> Self {
        Self(std::fs::read(fixture(path)).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn bf16(&self, name: &str) -> Vec<f32> {
        self.bytes(name)
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32())
            .collect()
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
