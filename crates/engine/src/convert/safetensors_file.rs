//! Safetensors files written and read in pieces: the header first, then each tensor's bytes at their place, in any order.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::ConvertError;
use crate::checkpoint::Header;

/// Bytes before the header: its length, little-endian.
const LENGTH_BYTES: u64 = 8;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorSpec {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl TensorSpec {
    pub(super) fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// A file being written.
#[derive(Debug)]
pub(super) struct SafetensorsWriter {
    path: PathBuf,
    file: File,
    data_start: u64,
    header: Metadata,
}

impl SafetensorsWriter {
    /// Lays out `tensors` as the safetensors library does (wide types first, then by name) and writes the header.
    pub(super) fn create(path: &Path, mut tensors: Vec<TensorSpec>) -> Result<Self, ConvertError> {
        tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut offset = 0;
        let entries = tensors
            .into_iter()
            .map(|tensor| {
                let end = offset + tensor.bytes() as usize;
                let info =
                    TensorInfo { dtype: tensor.dtype, shape: tensor.shape, data_offsets: (offset, end) };
                offset = end;
                (tensor.name, info)
            })
            .collect();
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let invalid =
            |e: &dyn std::fmt::Display| ConvertError::output(path, format!("safetensors header: {e}"));
        let header = Metadata::new(Some(format), entries).map_err(|e| invalid(&e))?;
        let mut bytes = serde_json::to_vec(&header).map_err(|e| invalid(&e))?;
        bytes.resize(bytes.len().next_multiple_of(8), b' ');

        let file = File::create_new(path).map_err(ConvertError::io("create", path))?;
        let length = bytes.len() as u64;
        file.write_all_at(&length.to_le_bytes(), 0).map_err(ConvertError::io("write", path))?;
        file.write_all_at(&bytes, LENGTH_BYTES).map_err(ConvertError::io("write", path))?;
        Ok(Self { path: path.to_owned(), file, data_start: LENGTH_BYTES + length, header })
    }

    /// Writes bytes of a tensor, `offset` bytes from its start.
    pub(super) fn write(&self, tensor: &str, offset: u64, bytes: &[u8]) -> Result<(), ConvertError> {
        let info = self.header.info(tensor).ok_or_else(|| {
            ConvertError::output(&self.path, format!("tensor {tensor} is not in the header"))
        })?;
        let (start, end) = (info.data_offsets.0 as u64 + offset, info.data_offsets.1 as u64);
        if start + bytes.len() as u64 > end {
            return Err(ConvertError::output(&self.path, format!("tensor {tensor} overflows its place")));
        }
        self.file.write_all_at(bytes, self.data_start + start).map_err(ConvertError::io("write", &self.path))
    }
}

/// A file being read. Its header is checked as the engine does it: the tensors tile the file.
#[derive(Debug)]
pub(super) struct SafetensorsReader {
    path: PathBuf,
    file: File,
    header: Header,
}

impl SafetensorsReader {
    pub(super) fn open(path: &Path) -> Result<Self, ConvertError> {
        let file = File::open(path).map_err(ConvertError::io("open", path))?;
        let header = Header::read(&file, path)?;
        Ok(Self { path: path.to_owned(), file, header })
    }

    /// The tensors in the order of their bytes.
    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let mut infos: Vec<_> = self.header.tensors.iter().collect();
        infos.sort_by_key(|(name, info)| (info.data_offsets, *name));
        let spec = |(name, info): (&String, &TensorInfo)| TensorSpec {
            name: name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
        };
        infos.into_iter().map(spec).collect()
    }

    /// Reads bytes of a tensor, `offset` bytes from its start.
    pub(super) fn read(&self, tensor: &str, offset: u64, buffer: &mut [u8]) -> Result<(), ConvertError> {
        let info = self
            .header
            .tensors
            .get(tensor)
            .ok_or_else(|| ConvertError::input(&self.path, format!("tensor {tensor} is missing")))?;
        let start = self.header.data_start + info.data_offsets.0 as u64 + offset;
        self.file
            .read_exact_at(buffer, start)
            .map_err(|e| ConvertError::input(&self.path, format!("tensor {tensor}: {e}")))
    }
}
