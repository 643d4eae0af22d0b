//! A Hugging Face checkpoint on disk: which file holds which tensor, and reads of parts of one. Headers are read and checked
//! when it is opened; weights only by positioned reads of what is asked for.

mod digest;
mod header;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use herd_model::{
    ConfigError, INDEX_FILE, ModelConfig, SIDE_FILES, SINGLE_FILE, ShardPlan, SizeError, StoredTensor,
    model_digest, weight_bytes,
};
pub(crate) use safetensors::Dtype as Stored;
use serde::Deserialize;

pub(crate) use header::Header;

/// Far above any JSON file beside the weights; an index of the 405B has 0.1 MB.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// A checkpoint that cannot be read, with the file and where it applies the tensor at fault.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither `model.safetensors` nor an index of several files.
    #[error("{}: no {SINGLE_FILE} and no {INDEX_FILE} in this folder", folder.display())]
    NoWeights {
        /// Looked in.
        folder: PathBuf,
    },
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file whose content makes no sense.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A tensor the model needs and no file has.
    #[error("{}: tensor {tensor} is missing", folder.display())]
    NoTensor {
        /// Looked in.
        folder: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// Tensors that do not make up the model of `config.json`.
    #[error("{}: {source}", folder.display())]
    Size {
        /// Looked in.
        folder: PathBuf,
        /// Which, and why.
        source: SizeError,
    },
    /// A tensor that is not what `config.json` makes of it.
    #[error("{}: tensor {tensor} {problem}", path.display())]
    BadTensor {
        /// The file that holds it.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
}

/// What the header of a safetensors file says is in it, checked against the size of the file.
pub fn tensors_of_file(path: &Path) -> Result<Vec<StoredTensor>, CheckpointError> {
    let file = File::open(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    let Header { tensors, data_start: _ } = Header::read(&file, path)?;
    let stored = tensors.into_iter().map(|(name, info)| {
        stored_tensor(&name, info.dtype, &info.shape).map_err(|problem| CheckpointError::BadTensor {
            path: path.to_owned(),
            tensor: name,
            problem,
        })
    });
    stored.collect()
}

fn stored_tensor(name: &str, dtype: Stored, shape: &[usize]) -> Result<StoredTensor, String> {
    let format = format!("{dtype:?}").parse().map_err(|_| format!("is {dtype:?}, which no model has"))?;
    Ok(StoredTensor { name: name.to_owned(), format, shape: shape.to_vec() })
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: ModelConfig,
    files: Vec<WeightFile>,
    tensors: HashMap<String, Place>,
}

#[derive(Debug)]
struct WeightFile {
    path: PathBuf,
    file: File,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Stored,
    shape: Vec<usize>,
    offset: u64,
}

/// A tensor of a checkpoint, to read parts of.
#[derive(Clone, Copy)]
pub(crate) struct Tensor<'a> {
    name: &'a str,
    place: &'a Place,
    file: &'a WeightFile,
}

impl Checkpoint {
    /// Reads `config.json` and the headers of all weight files.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config = read_json(&folder.join("config.json"))?;
        let generation = folder.join("generation_config.json");
        let generation = if generation.exists() { Some(read_json(&generation)?) } else { None };
        let config = ModelConfig::from_json(&config, generation.as_deref())?;

        let mut files = Vec::new();
        let mut tensors = HashMap::new();
        for (name, expected) in weight_files(folder)? {
            let path = folder.join(&name);
            let file = File::open(&path).map_err(|source| match expected.iter().flatten().next() {
                Some(tensor) if source.kind() == io::ErrorKind::NotFound => {
                    let problem = format!("is not there, and {INDEX_FILE} places tensor {tensor} in it");
                    CheckpointError::BadFile { path: path.clone(), problem }
                }
                _ => CheckpointError::Io { path: path.clone(), source },
            })?;
            let Header { tensors: infos, data_start } = Header::read(&file, &path)?;
            for (tensor, info) in infos {
                if expected.as_ref().is_some_and(|expected| !expected.contains(&tensor)) {
                    continue;
                }
                let offset = data_start + info.data_offsets.0 as u64;
                let place = Place { file: files.len(), dtype: info.dtype, shape: info.shape, offset };
                tensors.insert(tensor, place);
            }
            if let Some(missing) = expected.iter().flatten().find(|tensor| !tensors.contains_key(*tensor)) {
                let problem = format!("no tensor {missing}, which {INDEX_FILE} places here");
                return Err(CheckpointError::BadFile { path, problem });
            }
            files.push(WeightFile { path, file });
        }
        Ok(Self { folder: folder.to_owned(), config, files, tensors })
    }

    /// `config.json` and `generation_config.json`, checked.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the headers say there is, in no order.
    pub fn stored_tensors(&self) -> Result<Vec<StoredTensor>, CheckpointError> {
        let tensors = self.tensors.iter();
        let stored = tensors.map(|(name, Place { file, dtype, shape, offset: _ })| {
            stored_tensor(name, *dtype, shape).map_err(|problem| {
                let path = self.files[*file].path.clone();
                CheckpointError::BadTensor { path, tensor: name.clone(), problem }
            })
        });
        stored.collect()
    }

    /// Bytes of the checkpoint that each rank of a plan holds, by rank. Every tensor that the model is computed with has to be
    /// there and of the shape that `config.json` makes it; no weights are read.
    pub fn weight_bytes(&self, plan: &ShardPlan) -> Result<Vec<u64>, CheckpointError> {
        let bytes = weight_bytes(&self.config, plan, &self.stored_tensors()?);
        bytes.map_err(|source| CheckpointError::Size { folder: self.folder.clone(), source })
    }

    /// The model digest: reads small files whole and the headers of large weight files.
    pub fn digest(&self) -> Result<String, CheckpointError> {
        let side = SIDE_FILES.iter().map(|name| self.folder.join(name)).filter(|path| path.exists());
        let weights = self.files.iter().map(|file| file.path.clone());
        let entries =
            side.chain(weights).map(|path| digest::file_digest(&path)).collect::<Result<Vec<_>, _>>()?;
        Ok(model_digest(&entries))
    }

    /// A tensor that has to be there, in one of these formats and of this shape.
    pub(crate) fn tensor<'a>(
        &'a self,
        name: &'a str,
        dtypes: &[Stored],
        shape: &[usize],
    ) -> Result<Tensor<'a>, CheckpointError> {
        let tensor = self.of_format(name, dtypes)?;
        if tensor.place.shape != shape {
            return Err(tensor.bad(format!("is {:?}; config.json makes it {shape:?}", tensor.place.shape)));
        }
        Ok(tensor)
    }

    /// The same of one number, of however many dimensions.
    pub(crate) fn scalar<'a>(
        &'a self,
        name: &'a str,
        dtypes: &[Stored],
    ) -> Result<Tensor<'a>, CheckpointError> {
        let tensor = self.of_format(name, dtypes)?;
        if tensor.place.shape.iter().any(|size| *size != 1) {
            return Err(tensor.bad(format!("is {:?}; config.json makes it one number", tensor.place.shape)));
        }
        Ok(tensor)
    }

    fn of_format<'a>(&'a self, name: &'a str, dtypes: &[Stored]) -> Result<Tensor<'a>, CheckpointError> {
        let Some(place) = self.tensors.get(name) else {
            return Err(CheckpointError::NoTensor { folder: self.folder.clone(), tensor: name.to_owned() });
        };
        let tensor = Tensor { name, place, file: &self.files[place.file] };
        if !dtypes.contains(&place.dtype) {
            let wanted = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(" or ");
            return Err(tensor.bad(format!("is {:?}; config.json asks for {wanted}", place.dtype)));
        }
        Ok(tensor)
    }
}

impl Tensor<'_> {
    pub(crate) fn dtype(&self) -> Stored {
        self.place.dtype
    }

    /// Bytes of one element.
    pub(crate) fn element(&self) -> usize {
        self.place.dtype.bitsize() / 8
    }

    /// Reads rows `rows` and of each of them columns `columns`, one after the other. A tensor of one dimension is one
    /// column wide.
    pub(crate) fn read(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        into: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let width = self.place.shape.get(1).copied().unwrap_or(1);
        let element = self.element();
        into.clear();
        into.resize(rows.len() * columns.len() * element, 0);
        let at = |row: usize, column: usize| self.place.offset + ((row * width + column) * element) as u64;
        let read = |part: &mut [u8], offset| {
            self.file.file.read_exact_at(part, offset).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    self.bad("is cut off: the file has shrunk since its header was read".to_owned())
                }
                _ => self.bad(format!("cannot be read: {error}")),
            })
        };
        if columns.len() == width {
            return read(into, at(rows.start, 0));
        }
        for (row, part) in rows.zip(into.chunks_exact_mut((columns.len() * element).max(1))) {
            read(part, at(row, columns.start))?;
        }
        Ok(())
    }

    pub(crate) fn bad(&self, problem: String) -> CheckpointError {
        CheckpointError::BadTensor { path: self.file.path.clone(), tensor: self.name.to_owned(), problem }
    }
}

/// Names of the weight files, and for files of an index the tensors each of them has to hold.
fn weight_files(folder: &Path) -> Result<BTreeMap<String, Option<Vec<String>>>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    if folder.join(SINGLE_FILE).exists() {
        return Ok(BTreeMap::from([(SINGLE_FILE.to_owned(), None)]));
    }
    let path = folder.join(INDEX_FILE);
    if !path.exists() {
        return Err(CheckpointError::NoWeights { folder: folder.to_owned() });
    }
    let Index { weight_map } = serde_json::from_slice(&read_json(&path)?)
        .map_err(|error| CheckpointError::BadFile { path: path.clone(), problem: error.to_string() })?;
    let mut files: BTreeMap<String, Option<Vec<String>>> = BTreeMap::new();
    for (tensor, file) in weight_map {
        if file.contains(['/', '\\']) || Path::new(&file).extension().is_none_or(|end| end != "safetensors") {
            let problem =
                format!("places tensor {tensor} in {file:?}; that is no safetensors file of this folder");
            return Err(CheckpointError::BadFile { path, problem });
        }
        files.entry(file).or_default().get_or_insert_default().push(tensor);
    }
    Ok(files)
}

fn read_json(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(io)?.len();
    if size > MAX_JSON_BYTES {
        let problem = format!("has {size} bytes; at most {MAX_JSON_BYTES} make sense");
        return Err(CheckpointError::BadFile { path: path.to_owned(), problem });
    }
    fs::read(path).map_err(io)
}

#[cfg(test)]
mod tests;
