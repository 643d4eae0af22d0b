//! The header of a safetensors file: eight bytes of length, then JSON that gives each tensor's dtype, shape and place.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::CheckpointError;

/// What the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;
/// The one name that is no tensor's.
const METADATA: &str = "__metadata__";

/// Tensors of a file, checked: sizes follow from dtypes and shapes, and the tensors tile the rest of the file.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) tensors: HashMap<String, TensorInfo>,
    /// Where the tensors' offsets count from, in bytes from the start of the file.
    pub(crate) data_start: u64,
}

impl Header {
    pub(crate) fn read(file: &File, path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let bad = |problem: String| CheckpointError::BadFile { path: path.to_owned(), problem };
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(bad("is no regular file".to_owned()));
        }
        let file_bytes = metadata.len();
        let header_bytes =
            header_length(file, file_bytes).map_err(io)?.ok_or_else(|| bad(no_header(file_bytes)))?;
        let mut json = vec![0; header_bytes as usize];
        file.read_exact_at(&mut json, LENGTH_BYTES).map_err(io)?;
        Self::parse(&json, file_bytes).map_err(bad)
    }

    /// Of a file that is in memory whole, or says what is wrong with it.
    pub(crate) fn of_bytes(file: &[u8]) -> Result<Self, String> {
        let file_bytes = file.len() as u64;
        let json = file.split_first_chunk().and_then(|(length, rest)| {
            let length = allowed_length(u64::from_le_bytes(*length), file_bytes)?;
            rest.get(..length as usize)
        });
        Self::parse(json.ok_or_else(|| no_header(file_bytes))?, file_bytes)
    }

    fn parse(json: &[u8], file_bytes: u64) -> Result<Self, String> {
        let Tensors(tensors) =
            serde_json::from_slice(json).map_err(|error| format!("safetensors header: {error}"))?;
        let data_start = LENGTH_BYTES + json.len() as u64;
        check(&tensors, file_bytes - data_start)?;
        Ok(Self { tensors, data_start })
    }
}

fn no_header(file_bytes: u64) -> String {
    format!("has {file_bytes} bytes and no safetensors header within its first {MAX_HEADER_BYTES}")
}

/// Bytes of the JSON, if the file can hold it.
pub(super) fn header_length(file: &File, file_bytes: u64) -> std::io::Result<Option<u64>> {
    if file_bytes < LENGTH_BYTES {
        return Ok(None);
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0)?;
    Ok(allowed_length(u64::from_le_bytes(length), file_bytes))
}

fn allowed_length(length: u64, file_bytes: u64) -> Option<u64> {
    (length <= MAX_HEADER_BYTES.min(file_bytes.checked_sub(LENGTH_BYTES)?)).then_some(length)
}

/// By name; each is there once.
struct Tensors(HashMap<String, TensorInfo>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TensorsVisitor)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = Tensors;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensors, A::Error> {
        let mut tensors = HashMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let info =
                map.next_value().map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
            match tensors.entry(name) {
                Entry::Vacant(place) => place.insert(info),
                Entry::Occupied(place) => {
                    return Err(A::Error::custom(format!("tensor {} is there twice", place.key())));
                }
            };
        }
        Ok(Tensors(tensors))
    }
}

fn check(tensors: &HashMap<String, TensorInfo>, data_bytes: u64) -> Result<(), String> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(name, info)| (info.data_offsets, *name));
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
