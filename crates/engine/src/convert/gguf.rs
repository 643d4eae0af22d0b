//! Reads the header of GGUF files, version 2 and 3 (little-endian), as the specification in ggml's `docs/gguf.md` has it.
//! Nothing in the file is believed: each count and length is checked against the bytes that are left before anything is allocated.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::ConvertError;
use super::ggml_type::{GgmlType, SUPPORTED, type_name};

/// No model has more keys, tensors or array elements than this.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_ARRAY: u64 = 1 << 24;
const MAX_STRING: u64 = 1 << 24;

/// The value of a metadata key. Integers of every width are `Int`, floats `Float`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    /// Arrays keep what their readers need: text and integers; of the others the length.
    Texts(Vec<String>),
    Ints(Vec<i32>),
    Other(u64),
}

#[derive(Debug, Clone)]
pub(super) struct GgufTensor {
    pub(super) name: String,
    pub(super) ty: GgmlType,
    /// Rows x row length, in elements: GGUF stores the row length first. A vector is one row.
    pub(super) rows: usize,
    pub(super) row_elements: usize,
    pub(super) dimensions: usize,
    /// From the start of the file.
    pub(super) offset: u64,
}

impl GgufTensor {
    pub(super) fn row_bytes(&self) -> usize {
        self.row_elements / self.ty.block_elements() * self.ty.block_bytes()
    }
}

/// What can be read from any place on.
trait ReadAt: std::fmt::Debug + Send + Sync {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

/// A file that is in memory whole.
impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..));
        rest.unwrap_or_default().read_exact(buffer)
    }
}

/// An open GGUF file, its header read and checked: every tensor lies within the file.
#[derive(Debug)]
pub(super) struct Gguf {
    path: PathBuf,
    file: Box<dyn ReadAt>,
    metadata: HashMap<String, Value>,
    tensors: Vec<GgufTensor>,
}

impl Gguf {
    pub(super) fn open(path: &Path) -> Result<Self, ConvertError> {
        let file = File::open(path).map_err(ConvertError::io("open", path))?;
        let length = file.metadata().map_err(ConvertError::io("stat", path))?.len();
        let mut reader =
            HeaderReader { path, input: BufReader::new(&file), left: length, place: "header".to_owned() };
        let (metadata, tensors) = reader.header(length)?;
        Ok(Self { path: path.to_owned(), file: Box::new(file), metadata, tensors })
    }

    /// Of a file that is in memory whole.
    pub(super) fn of_bytes(bytes: &[u8]) -> Result<Self, ConvertError> {
        let (path, left) = (Path::new("memory"), bytes.len() as u64);
        let mut reader = HeaderReader { path, input: bytes, left, place: "header".to_owned() };
        let (metadata, tensors) = reader.header(left)?;
        Ok(Self { path: path.to_owned(), file: Box::new(bytes.to_vec()), metadata, tensors })
    }

    pub(super) fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The bytes of `buffer.len() / row_bytes` rows from `first_row` on.
    pub(super) fn read_rows(
        &self,
        tensor: &GgufTensor,
        first_row: usize,
        buffer: &mut [u8],
    ) -> Result<(), ConvertError> {
        let offset = tensor.offset + (first_row * tensor.row_bytes()) as u64;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|e| self.error(format!("tensor {}: {e}", tensor.name)))
    }

    pub(super) fn error(&self, what: impl Into<String>) -> ConvertError {
        ConvertError::input(&self.path, what)
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, ConvertError> {
        value.ok_or_else(|| self.error(format!("key {key} is missing")))
    }

    fn wrong_type(&self, key: &str, expected: &str) -> ConvertError {
        self.error(format!("key {key} is not {expected}"))
    }

    pub(super) fn optional_u32(&self, key: &str) -> Result<Option<u32>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Int(value)) => match u32::try_from(*value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.error(format!("key {key} is {value}, out of range"))),
            },
            Some(_) => Err(self.wrong_type(key, "an integer")),
        }
    }

    pub(super) fn u32(&self, key: &str) -> Result<u32, ConvertError> {
        self.required(key, self.optional_u32(key)?)
    }

    pub(super) fn optional_float(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(_) => Err(self.wrong_type(key, "a finite float")),
        }
    }

    pub(super) fn float(&self, key: &str) -> Result<f64, ConvertError> {
        self.required(key, self.optional_float(key)?)
    }

    pub(super) fn optional_bool(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong_type(key, "a boolean")),
        }
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&str>, ConvertError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong_type(key, "a string")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<&str, ConvertError> {
        self.required(key, self.optional_text(key)?)
    }

    pub(super) fn texts(&self, key: &str) -> Result<&[String], ConvertError> {
        match self.required(key, self.get(key))? {
            Value::Texts(values) => Ok(values),
            _ => Err(self.wrong_type(key, "an array of strings")),
        }
    }

    pub(super) fn ints(&self, key: &str) -> Result<&[i32], ConvertError> {
        match self.required(key, self.get(key))? {
            Value::Ints(values) => Ok(values),
            _ => Err(self.wrong_type(key, "an array of 32-bit integers")),
        }
    }
}

/// Reads forward through the header; `left` is what the file still holds, `place` names the key or tensor for messages.
struct HeaderReader<'a, R> {
    path: &'a Path,
    input: R,
    left: u64,
    place: String,
}

type Header = (HashMap<String, Value>, Vec<GgufTensor>);

impl<R: Read> HeaderReader<'_, R> {
    fn error(&self, what: impl AsRef<str>) -> ConvertError {
        ConvertError::input(self.path, format!("{}: {}", self.place, what.as_ref()))
    }

    fn header(&mut self, length: u64) -> Result<Header, ConvertError> {
        if self.left < 4 || self.bytes::<4>()? != *b"GGUF" {
            return Err(self.error("not a GGUF file (it does not begin with \"GGUF\")"));
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            let big_endian = (2..=3).contains(&version.swap_bytes());
            let hint = if big_endian { " (a big-endian file)" } else { "" };
            return Err(self.error(format!("GGUF version {version}{hint} is not supported: 2 and 3 are")));
        }
        // The least a tensor entry takes: name length, number of dimensions, type, offset. A key: length, type, one byte.
        let tensor_count = self.count("tensor count", 8 + 4 + 4 + 8, MAX_TENSORS)?;
        let key_count = self.count("key count", 8 + 4 + 1, MAX_KEYS)?;

        let mut metadata = HashMap::with_capacity(key_count);
        for index in 0..key_count {
            self.place = format!("key {index}");
            let key = self.string()?;
            self.place = format!("key {key}");
            let value = self.value()?;
            if metadata.insert(key, value).is_some() {
                return Err(self.error("occurs twice"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Int(value)) if (8..=1 << 20).contains(value) && value % 8 == 0 => *value as u64,
            Some(_) => {
                return Err(ConvertError::input(self.path, "key general.alignment is not a multiple of 8"));
            }
        };

        let mut tensors: Vec<GgufTensor> = Vec::with_capacity(tensor_count);
        let mut names = std::collections::HashSet::with_capacity(tensor_count);
        for index in 0..tensor_count {
            self.place = format!("tensor {index}");
            let tensor = self.tensor(alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(self.error("occurs twice"));
            }
            tensors.push(tensor);
        }
        let data_start = (length - self.left).next_multiple_of(alignment);
        for tensor in &mut tensors {
            let size = (tensor.rows as u64).checked_mul(tensor.row_bytes() as u64);
            let end = size.and_then(|size| size.checked_add(tensor.offset)?.checked_add(data_start));
            if end.is_none_or(|end| end > length) {
                self.place = format!("tensor {}", tensor.name);
                return Err(
                    self.error(format!("lies beyond the end of the file ({length} bytes): is it cut short?"))
                );
            }
            tensor.offset += data_start;
        }
        Ok((metadata, tensors))
    }

    /// One tensor entry; its offset still counts from the start of the data.
    fn tensor(&mut self, alignment: u64) -> Result<GgufTensor, ConvertError> {
        let name = self.string()?;
        self.place = format!("tensor {name}");
        let dimensions = self.u32()? as usize;
        if !(1..=4).contains(&dimensions) {
            return Err(self.error(format!("has {dimensions} dimensions")));
        }
        let mut sizes = [1usize; 4];
        for size in &mut sizes[..dimensions] {
            *size = usize::try_from(self.u64()?).map_err(|_| self.error("has a dimension out of range"))?;
        }
        let id = self.u32()?;
        let offset = self.u64()?;
        let [row_elements, outer @ ..] = sizes;
        let rows = outer.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        let Some(rows) = rows.filter(|&rows| rows > 0 && row_elements > 0) else {
            return Err(self.error(format!("has an impossible shape {:?}", &sizes[..dimensions])));
        };
        let Some(ty) = GgmlType::from_id(id) else {
            return Err(self.error(format!("is {}: only {SUPPORTED} can be imported", type_name(id))));
        };
        if row_elements % ty.block_elements() != 0 || row_elements > usize::MAX / 64 {
            return Err(self.error(format!(
                "rows of {row_elements} elements are not whole blocks of {}",
                type_name(id)
            )));
        }
        if offset % alignment != 0 {
            return Err(self.error(format!("offset {offset} is not a multiple of the alignment {alignment}")));
        }
        Ok(GgufTensor { name, ty, rows, row_elements, dimensions, offset })
    }

    fn value(&mut self) -> Result<Value, ConvertError> {
        let kind = self.u32()?;
        Ok(match kind {
            8 => Value::Text(self.string()?),
            9 => self.array()?,
            _ => self.scalar(kind)?,
        })
    }

    fn array(&mut self) -> Result<Value, ConvertError> {
        let kind = self.u32()?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.error("is an array of arrays, which no Llama model has")),
            _ => return Err(self.error(format!("is an array of unknown type {kind}"))),
        };
        let count = self.count("array length", least, MAX_ARRAY)?;
        Ok(match kind {
            8 => {
                let mut values = Vec::with_capacity(count);
                for _ in 0..count {
                    values.push(self.string()?);
                }
                Value::Texts(values)
            }
            4 | 5 => {
                let mut values = Vec::with_capacity(count);
                for _ in 0..count {
                    values.push(self.u32()?.cast_signed());
                }
                Value::Ints(values)
            }
            _ => {
                for _ in 0..count {
                    self.scalar(kind)?;
                }
                Value::Other(count as u64)
            }
        })
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, ConvertError> {
        Ok(match kind {
            0 => Value::Int(i128::from(self.bytes::<1>()?[0])),
            1 => Value::Int(i128::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Int(i128::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Int(i128::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Int(i128::from(self.u32()?)),
            5 => Value::Int(i128::from(i32::from_le_bytes(self.bytes()?))),
            // Shortest decimal of the f32, read as f64: 1e-5 stays 1e-5 in config.json.
            6 => {
                let value = f32::from_le_bytes(self.bytes()?);
                Value::Float(value.to_string().parse().unwrap_or(f64::from(value)))
            }
            7 => Value::Bool(match self.bytes::<1>()?[0] {
                0 => false,
                1 => true,
                other => return Err(self.error(format!("is a boolean of value {other}"))),
            }),
            10 => Value::Int(i128::from(self.u64()?)),
            11 => Value::Int(i128::from(i64::from_le_bytes(self.bytes()?))),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(self.error(format!("has the unknown value type {kind}"))),
        })
    }

    /// A count whose items take at least `least` bytes each.
    fn count(&mut self, what: &str, least: u64, most: u64) -> Result<usize, ConvertError> {
        let count = self.u64()?;
        if count > most || count.checked_mul(least).is_none_or(|bytes| bytes > self.left) {
            return Err(
                self.error(format!("{what} {count} does not fit the {} bytes left in the file", self.left))
            );
        }
        Ok(count as usize)
    }

    fn string(&mut self) -> Result<String, ConvertError> {
        let length = self.count("string length", 1, MAX_STRING)?;
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.error("is not UTF-8"))
    }

    fn u32(&mut self) -> Result<u32, ConvertError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, ConvertError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ConvertError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ConvertError> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| self.error("the file ends in the middle of it"))?;
        self.input.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.error("the file ends in the middle of it"),
            _ => self.error(format!("read: {e}")),
        })
    }
}
