//! A bf16 checkpoint stored in another plain format.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// The same model, its weights in `stored`: f32 loses nothing of bf16, f16 of values from 2^-14 on neither.
pub(crate) fn restored(from: &Path, stored: Dtype) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let path = copy.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let given = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = given
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::BF16, "{name}");
            let values = view.data().as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32());
            let data: Vec<u8> = match stored {
                Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
                Dtype::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
                other => panic!("{other:?} is not made here"),
            };
            (name, view.shape().to_vec(), data)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, data)| (name, TensorView::new(stored, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    copy
}
