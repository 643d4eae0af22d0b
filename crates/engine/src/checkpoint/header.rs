//! The header of a safetensors file: eight bytes of length, then JSON that gives each tensor's dtype, shape and place.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use super::CheckpointError;

/// What the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;

/// Tensors of a file, checked: sizes follow from dtypes and shapes, and the tensors tile the rest of the file.
pub(super) struct Header {
    pub(super) tensors: HashMap<String, TensorInfo>,
    /// Where the tensors' offsets count from, in bytes from the start of the file.
    pub(super) data_start: u64,
}

impl Header {
    pub(super) fn read(file: &File, path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let bad = |problem: String| CheckpointError::BadFile { path: path.to_owned(), problem };
        let file_bytes = file.metadata().map_err(io)?.len();
        let header_bytes = header_length(file, file_bytes).map_err(io)?.ok_or_else(|| {
            bad(format!(
                "has {file_bytes} bytes and no safetensors header within its first {MAX_HEADER_BYTES}"
            ))
        })?;
        let mut json = vec![0; header_bytes as usize];
        file.read_exact_at(&mut json, LENGTH_BYTES).map_err(io)?;
        let data_start = LENGTH_BYTES + header_bytes;
        let tensors = parse(&json).map_err(bad)?;
        check(&tensors, file_bytes - data_start).map_err(bad)?;
        Ok(Self { tensors, data_start })
    }
}

/// Bytes of the JSON, if the file can hold it.
pub(super) fn header_length(file: &File, file_bytes: u64) -> std::io::Result<Option<u64>> {
    if file_bytes < LENGTH_BYTES {
        return Ok(None);
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    Ok((length <= MAX_HEADER_BYTES.min(file_bytes - LENGTH_BYTES)).then_some(length))
}

fn parse(json: &[u8]) -> Result<HashMap<String, TensorInfo>, String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "__metadata__")]
        _metadata: Option<HashMap<String, String>>,
        #[serde(flatten)]
        tensors: HashMap<String, TensorInfo>,
    }
    let File { _metadata, tensors } =
        serde_json::from_slice(json).map_err(|error| format!("safetensors header: {error}"))?;
    Ok(tensors)
}

fn check(tensors: &HashMap<String, TensorInfo>, data_bytes: u64) -> Result<(), String> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, info) in by_place {
        let fault = |problem: String| format!("tensor {name} {problem}");
        let TensorInfo { dtype, shape, data_offsets: (from, to) } = info;
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &side| bits.checked_mul(side));
        let Some(bytes) = bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8) else {
            return Err(fault(format!("is {dtype:?} {shape:?}, which no file can hold")));
        };
        if to.checked_sub(*from) != Some(bytes) {
            return Err(fault(format!("is {dtype:?} {shape:?}, {bytes} bytes, but lies at {from}..{to}")));
        }
        if *from != end {
            return Err(fault(format!("starts at {from}, the tensor before it ends at {end}")));
        }
        if *to as u64 > data_bytes {
            return Err(fault(format!(
                "ends at {to}, but the file has {data_bytes} bytes of tensors: it is cut off"
            )));
        }
        end = *to;
    }
    if end as u64 != data_bytes {
        return Err(format!("the last tensor ends at {end}, but the file has {data_bytes} bytes of tensors"));
    }
    Ok(())
}
