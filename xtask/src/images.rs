//! `cargo xtask images`: container images, made without a container engine.
//!
//! Each image is an OCI layout folder of its own in the cache, named after its tag. The tag of a program's image is a hash of all
//! that it holds, so that an image which a node has under that name is the right one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::binaries;
use crate::content;
use crate::herd_cluster::{HerdCluster, output};
use crate::models;
use crate::paths::Paths;
use crate::progress;
use crate::step::run;

/// The programs that run in a cluster.
const PROGRAMS: [(&str, &str); 3] = [
    ("herd-operator", "Herd's operator: makes the fleet of a LlamaDeployment"),
    ("herd-gateway", "Herd's gateway: gRPC and the OpenAI API"),
    ("herd-worker", "Herd's worker: ranks of a gang"),
];

/// Of the base layer's `nonroot`.
const USER: &str = "65532:65532";

const LICENCE: &str = env!("CARGO_PKG_LICENSE");
const SOURCE: &str = env!("CARGO_PKG_REPOSITORY");
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Registry of every image that the nodes of a local cluster can pull.
const REGISTRY: &str = "lk.local";

/// Tags of one image that are kept, for clones beside this one.
const KEPT: usize = 3;

/// An image in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    /// `lk.local/NAME:TAG`
    pub(crate) reference: String,
    /// Its OCI layout.
    pub(crate) layout: PathBuf,
}

/// All images.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    pub(crate) operator: Image,
    pub(crate) gateway: Image,
    pub(crate) worker: Image,
    pub(crate) models: Vec<Image>,
}

impl Images {
    /// Each of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Image> {
        let Self { operator, gateway, worker, models } = self;
        [operator, gateway, worker].into_iter().chain(models)
    }

    /// What the chart is told of them.
    pub(crate) fn values(&self) -> String {
        let Self { operator, gateway, worker, models: _ } = self;
        format!(
            "images:\n  operator: {}\n  gateway: {}\n  worker: {}\n",
            operator.reference, gateway.reference, worker.reference
        )
    }
}

/// Makes the images that are not there.
pub(crate) fn make(paths: &Paths, program: &HerdCluster) -> Result<Images> {
    progress::step("programs", |activity| Ok(((), binaries::all(paths, activity)?)))?;
    progress::step("models", |_| Ok(((), models::make(paths)?.join(", "))))?;
    let base = progress::step("base layer", |_| {
        let path = PathBuf::from(output(program.command(&["image", "base"])?)?.trim());
        let size = megabytes(size(&path)?);
        Ok((path, size))
    })?;
    let [operator, gateway, worker] = PROGRAMS
        .map(|(name, title)| progress::step(name, |_| program_image(paths, program, &base, name, title)));
    let (operator, gateway, worker) = (operator?, gateway?, worker?);
    let programs = [&operator, &gateway, &worker];
    let together = programs.iter().try_fold(0, |sum, (_, own)| anyhow::Ok(sum + own))? + size(&base)?;
    eprintln!("  {:<40} {}", "three images on one base layer", megabytes(together));
    let models = [models::BF16, models::FP8]
        .map(|name| progress::step(&format!("image {name}"), |_| model_image(paths, program, name)));
    let models = models.into_iter().collect::<Result<_>>()?;
    Ok(Images { operator: operator.0, gateway: gateway.0, worker: worker.0, models })
}

/// An image of the base layer and one stripped program, and the bytes of the latter.
fn program_image(
    paths: &Paths,
    herd_cluster: &HerdCluster,
    base: &Path,
    name: &str,
    title: &str,
) -> Result<((Image, u64), String)> {
    let folder = folder(paths, name)?;
    let stripped = Scratch(folder.join(format!(".{}", std::process::id())));
    strip(&binaries::path(paths, name), &stripped.0)?;
    let own = size(&stripped.0)?;
    let entrypoint = format!("/usr/bin/{name}");
    let annotations = annotations(title);
    let mut words = vec!["1", &entrypoint, USER];
    words.extend(annotations.iter().map(String::as_str));
    let sums = [content::sha256(base)?, content::sha256(&stripped.0)?];
    words.extend(sums.iter().map(String::as_str));
    let tag = tag(&words);

    let layer = format!("{}={entrypoint}", stripped.0.display());
    let base = base.display().to_string();
    let mut arguments =
        vec!["--layer", &base, "--layer", &layer, "--entrypoint", &entrypoint, "--user", USER];
    arguments.extend(annotations.iter().flat_map(|annotation| ["--annotation", annotation]));
    let (image, how) = ensure_image(herd_cluster, &folder, name, &tag, &tag, &arguments)?;
    Ok(((image, own), format!("{how}, {}", megabytes(own))))
}

/// An image with a checkpoint's files at its root. Its tag is always 1: manifests name it.
fn model_image(paths: &Paths, herd_cluster: &HerdCluster, name: &str) -> Result<(Image, String)> {
    let folder = folder(paths, name)?;
    let checkpoint = paths.models.join(name);
    let annotations = annotations(name);
    let sums = content::sha256(&checkpoint.join("SHA256SUMS"))?;
    let key = tag(&["1", &sums, &annotations.concat()]);
    let layer = checkpoint.display().to_string();
    let mut arguments = vec!["--layer", &layer];
    arguments.extend(annotations.iter().flat_map(|annotation| ["--annotation", annotation]));
    ensure_image(herd_cluster, &folder, name, "1", &key, &arguments)
}

/// An image of one static program.
pub(crate) fn tool_image(
    paths: &Paths,
    herd_cluster: &HerdCluster,
    name: &str,
    program: &Path,
) -> Result<Image> {
    let folder = folder(paths, name)?;
    let entrypoint = format!("/bin/{name}");
    // The folder of a tool is named after all that it was built from.
    let tag = tag(&["1", &entrypoint, USER, &program.display().to_string()]);
    let layer = format!("{}={entrypoint}", program.display());
    let arguments = ["--layer", &layer, "--entrypoint", &entrypoint, "--user", USER];
    Ok(ensure_image(herd_cluster, &folder, name, &tag, &tag, &arguments)?.0)
}

/// Makes NAME:TAG in the folder KEY where that is not there.
fn ensure_image(
    herd_cluster: &HerdCluster,
    folder: &Path,
    name: &str,
    tag: &str,
    key: &str,
    arguments: &[&str],
) -> Result<(Image, String)> {
    let layout = folder.join(key);
    let image = Image { reference: format!("{REGISTRY}/{name}:{tag}"), layout: layout.clone() };
    if layout.join("index.json").is_file() {
        // Images are pruned by their age.
        let _ = fs::File::open(&layout).and_then(|folder| folder.set_modified(std::time::SystemTime::now()));
        return Ok((image, "cached".to_owned()));
    }
    let fresh = Scratch(folder.join(format!(".{}.layout", std::process::id())));
    let mut build = herd_cluster.command(&["image", "build", "--layout"])?;
    build.arg(&fresh.0).args(arguments).arg(format!("{name}:{tag}"));
    let reference = output(build)?;
    ensure!(reference.trim() == image.reference, "image {} was named {}", image.reference, reference.trim());
    match fs::rename(&fresh.0, &layout) {
        // Another process was faster.
        Err(_) if layout.join("index.json").is_file() => {}
        renamed => renamed.with_context(|| format!("rename to {}", layout.display()))?,
    }
    let others = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let others = others.filter_map(|entry| Some(entry.ok()?.path()));
    content::prune(others.filter(|path| path.join("index.json").is_file()).collect(), KEPT);
    Ok((image, "built".to_owned()))
}

/// A file or folder that is not to stay.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Gone already where it was renamed.
        let _ = if self.0.is_dir() { fs::remove_dir_all(&self.0) } else { fs::remove_file(&self.0) };
    }
}

/// The images of one name.
fn folder(paths: &Paths, name: &str) -> Result<PathBuf> {
    let folder = paths.cache.join("images").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

/// A copy without symbols: a third of the size, and panics still say where they were.
fn strip(program: &Path, to: &Path) -> Result<()> {
    let mut strip = Command::new("strip");
    strip.arg("--strip-all").arg("-o").arg(to).arg(program);
    let (success, output) = run(strip);
    ensure!(success, "strip, of the Debian package binutils, failed: {}", output.trim_end());
    Ok(())
}

fn annotations(title: &str) -> Vec<String> {
    let pairs = [("title", title), ("version", VERSION), ("licenses", LICENCE), ("source", SOURCE)];
    pairs.map(|(key, value)| format!("org.opencontainers.image.{key}={value}")).to_vec()
}

/// A tag for all that an image is made of.
fn tag(words: &[&str]) -> String {
    let mut tag = content::sha256_of(words);
    tag.truncate(12);
    tag
}

fn size(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).with_context(|| format!("read {}", path.display()))?.len())
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_changes_with_each_part() {
        let parts = ["1", "/usr/bin/herd-worker", USER, "title", "base", "program"];
        let first = tag(&parts);
        assert_eq!(first, tag(&parts));
        assert!(first.len() == 12 && first.chars().all(|c| c.is_ascii_hexdigit()), "{first}");
        for n in 0..parts.len() {
            let mut others = parts;
            others[n] = "other";
            assert_ne!(tag(&others), first, "part {n}");
        }
    }

    #[test]
    fn the_chart_is_told_all_three_references() {
        let image = |name: &str| Image { reference: format!("lk.local/{name}:1"), layout: PathBuf::new() };
        let images = Images {
            operator: image("o"),
            gateway: image("g"),
            worker: image("w"),
            models: vec![image("m")],
        };
        assert_eq!(
            images.values(),
            "images:\n  operator: lk.local/o:1\n  gateway: lk.local/g:1\n  worker: lk.local/w:1\n"
        );
        assert_eq!(images.all().count(), 4);
    }

    #[test]
    fn annotations_say_what_the_image_is() {
        assert!(annotations("t").contains(&"org.opencontainers.image.title=t".to_owned()));
        assert!(annotations("t").contains(&"org.opencontainers.image.licenses=Apache-2.0".to_owned()));
    }
}
