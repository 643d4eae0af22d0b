//! A GGUF file to a checkpoint, in bf16 or on to FP8.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use herd_engine::convert::{FileSum, Progress, import_gguf};

use super::quantize::{self, Layout, QuantizeOptions};

/// What an import ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// All weights in bf16
    Bf16,
    /// See `herd models quantize`
    #[value(name = "fbgemm_fp8")]
    FbgemmFp8,
    /// See `herd models quantize`
    #[value(name = "compressed-tensors")]
    CompressedTensors,
}

/// Imports `file` into `out`.
pub(super) fn run(
    file: &Path,
    out: &Path,
    to: Target,
    options: &QuantizeOptions,
    force: bool,
    progress: &dyn Progress,
) -> anyhow::Result<Vec<FileSum>> {
    let layout = match to {
        Target::Bf16 => {
            ensure!(!options.is_given(), "options of quantizing need --to fbgemm_fp8 or compressed-tensors");
            return Ok(import_gguf(file, out, force, progress)?);
        }
        Target::FbgemmFp8 => Layout::FbgemmFp8,
        Target::CompressedTensors => Layout::CompressedTensors,
    };
    // A look before minutes of work; quantizing looks again.
    ensure!(
        force || fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none()),
        "{}: exists and is not empty: choose another --out, or pass --force",
        out.display()
    );
    let path = beside(out)?;
    import_gguf(file, &path, true, progress)?;
    // From here on it is ours to remove.
    let bf16 = Intermediate(path);
    quantize::run(&bf16.0, out, layout, options, force, progress)
}

/// The bf16 checkpoint on the way; removed when dropped.
struct Intermediate(PathBuf);

fn beside(out: &Path) -> anyhow::Result<PathBuf> {
    let name = out.file_name().context("the output needs a directory name of its own")?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".bf16");
    Ok(out.with_file_name(hidden))
}

impl Drop for Intermediate {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
