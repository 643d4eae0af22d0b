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
use crate::models;
use crate::oci::{Layer, Layout, Recipe, Registry, base};
use crate::paths::Paths;
use crate::progress;
use crate::step::run;

/// The way images are made: a change of it makes all of them anew.
const FORMAT: &str = "2";

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
const LOCAL: &str = "lk.local";

/// Tags of one image that are kept, for clones beside this one.
const KEPT: usize = 3;

/// An image in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) name: String,
    /// What nodes pull: `lk.local/NAME:TAG`, or as it was pushed.
    pub(crate) reference: String,
    /// Its OCI layout, in a folder that is named after its content.
    pub(crate) layout: PathBuf,
}

impl Image {
    /// A tag that no other content of this image has.
    pub(crate) fn content_tag(&self) -> String {
        self.layout.file_name().unwrap_or_default().display().to_string()
    }

    /// The same image in another registry.
    fn moved(&self, registry: &Registry) -> Self {
        Self { reference: registry.reference(&self.name, &self.content_tag()), ..self.clone() }
    }
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

    /// The same images in another registry.
    pub(crate) fn moved(&self, registry: &Registry) -> Self {
        let Self { operator, gateway, worker, models } = self;
        Self {
            operator: operator.moved(registry),
            gateway: gateway.moved(registry),
            worker: worker.moved(registry),
            models: models.iter().map(|model| model.moved(registry)).collect(),
        }
    }
}

/// Makes the images that are not there, of all programs and of some models.
pub(crate) fn make(paths: &Paths, names: &[&str]) -> Result<Images> {
    progress::step("programs", |activity| Ok(((), binaries::all(paths, activity)?)))?;
    progress::step("models", |_| Ok(((), models::make(paths)?.join(", "))))?;
    let base = progress::step("base layer", |_| {
        let path = base::layer(&paths.cache.join("tools"))?;
        let size = megabytes(size(&path)?);
        Ok((path, size))
    })?;
    let [operator, gateway, worker] =
        PROGRAMS.map(|(name, title)| progress::step(name, |_| program_image(paths, &base, name, title)));
    let (operator, gateway, worker) = (operator?, gateway?, worker?);
    let programs = [&operator, &gateway, &worker];
    let together = programs.iter().try_fold(0, |sum, (_, own)| anyhow::Ok(sum + own))? + size(&base)?;
    eprintln!("  {:<40} {}", "three images on one base layer", megabytes(together));
    let models =
        names.iter().map(|name| progress::step(&format!("image {name}"), |_| model_image(paths, name)));
    let models = models.collect::<Result<_>>()?;
    Ok(Images { operator: operator.0, gateway: gateway.0, worker: worker.0, models })
}

/// An image of the base layer and one stripped program, and the bytes of the latter.
fn program_image(paths: &Paths, base: &Path, name: &str, title: &str) -> Result<((Image, u64), String)> {
    let folder = folder(paths, name)?;
    let stripped = Scratch(folder.join(format!(".{}", std::process::id())));
    strip(&binaries::path(paths, name), &stripped.0)?;
    let own = size(&stripped.0)?;
    let entrypoint = format!("/usr/bin/{name}");
    let recipe = Recipe {
        layers: vec![Layer::Tar(base), Layer::File(&stripped.0, &entrypoint)],
        entrypoint: Some(&entrypoint),
        user: Some(USER),
        annotations: annotations(title),
    };
    let sums = [content::sha256(base)?, content::sha256(&stripped.0)?];
    let tag = tag(&recipe, &sums.each_ref().map(String::as_str));
    let (image, how) = ensure_image(&folder, name, &tag, &tag, &recipe)?;
    Ok(((image, own), format!("{how}, {}", megabytes(own))))
}

/// An image with a checkpoint's files at its root. Its tag in a local cluster is always 1: manifests name it.
fn model_image(paths: &Paths, name: &str) -> Result<(Image, String)> {
    let folder = folder(paths, name)?;
    let checkpoint = paths.models.join(name);
    let layers = vec![Layer::Tree(&checkpoint)];
    let recipe = Recipe { layers, entrypoint: None, user: None, annotations: annotations(name) };
    let sums = content::sha256(&checkpoint.join("SHA256SUMS"))?;
    let key = tag(&recipe, &[&sums]);
    ensure_image(&folder, name, "1", &key, &recipe)
}

/// An image of one static program.
pub(crate) fn tool_image(paths: &Paths, name: &str, program: &Path) -> Result<Image> {
    let folder = folder(paths, name)?;
    let entrypoint = format!("/bin/{name}");
    let recipe = Recipe {
        layers: vec![Layer::File(program, &entrypoint)],
        entrypoint: Some(&entrypoint),
        user: Some(USER),
        annotations: Vec::new(),
    };
    // The folder of a tool is named after all that it was built from.
    let tag = tag(&recipe, &[&program.display().to_string()]);
    Ok(ensure_image(&folder, name, &tag, &tag, &recipe)?.0)
}

/// Makes NAME:TAG in the folder KEY where that is not there.
fn ensure_image(
    folder: &Path,
    name: &str,
    tag: &str,
    key: &str,
    recipe: &Recipe<'_>,
) -> Result<(Image, String)> {
    let layout = folder.join(key);
    let reference = format!("{LOCAL}/{name}:{tag}");
    let image = Image { name: name.to_owned(), reference, layout: layout.clone() };
    if layout.join("index.json").is_file() {
        // Images are pruned by their age.
        let _ = fs::File::open(&layout).and_then(|folder| folder.set_modified(std::time::SystemTime::now()));
        return Ok((image, "cached".to_owned()));
    }
    let fresh = Scratch(folder.join(format!(".{}.layout", std::process::id())));
    recipe.make(&Layout::create(&fresh.0)?, &image.reference)?;
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

fn annotations(title: &str) -> Vec<(&'static str, String)> {
    vec![
        ("org.opencontainers.image.title", title.to_owned()),
        ("org.opencontainers.image.version", VERSION.to_owned()),
        ("org.opencontainers.image.licenses", LICENCE.to_owned()),
        ("org.opencontainers.image.source", SOURCE.to_owned()),
    ]
}

/// A tag for all that an image is made of; `sums` are its layers' contents.
fn tag(recipe: &Recipe<'_>, sums: &[&str]) -> String {
    let Recipe { layers, entrypoint, user, annotations } = recipe;
    let mut words = vec![FORMAT, entrypoint.unwrap_or_default(), user.unwrap_or_default()];
    for layer in layers {
        words.push(match layer {
            Layer::Tree(_) => "tree",
            Layer::File(_, at) => at,
            Layer::Tar(_) => "tar",
        });
    }
    words.extend(annotations.iter().flat_map(|(key, value)| [key, value.as_str()]));
    words.extend(sums);
    let mut tag = content::sha256_of(&words);
    tag.truncate(12);
    tag
}

fn size(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).with_context(|| format!("read {}", path.display()))?.len())
}

pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program<'a>(base: &'a Path, entrypoint: &'a str, user: &'a str, title: &str) -> Recipe<'a> {
        Recipe {
            layers: vec![Layer::Tar(base), Layer::File(base, entrypoint)],
            entrypoint: Some(entrypoint),
            user: Some(user),
            annotations: annotations(title),
        }
    }

    #[test]
    fn a_tag_changes_with_each_part() {
        let base = Path::new("base.tar");
        let all = [
            (program(base, "/usr/bin/a", USER, "title"), "sum"),
            (program(base, "/usr/bin/b", USER, "title"), "sum"),
            (program(base, "/usr/bin/a", "0:0", "title"), "sum"),
            (program(base, "/usr/bin/a", USER, "other"), "sum"),
            (program(base, "/usr/bin/a", USER, "title"), "other"),
        ];
        let tags: Vec<String> = all.iter().map(|(recipe, sum)| tag(recipe, &[sum])).collect();
        assert_eq!(tags[0], tag(&program(Path::new("elsewhere"), "/usr/bin/a", USER, "title"), &["sum"]));
        for (n, one) in tags.iter().enumerate() {
            assert!(one.len() == 12 && one.chars().all(|c| c.is_ascii_hexdigit()), "{one}");
            assert!(!tags[..n].contains(one), "{n}");
        }
    }

    fn images() -> Images {
        let image = |name: &str| Image {
            name: name.to_owned(),
            reference: format!("lk.local/{name}:1"),
            layout: PathBuf::from(format!("/cache/{name}/0123")),
        };
        Images { operator: image("o"), gateway: image("g"), worker: image("w"), models: vec![image("m")] }
    }

    #[test]
    fn the_chart_is_told_all_three_references() {
        let images = images();
        assert_eq!(
            images.values(),
            "images:\n  operator: lk.local/o:1\n  gateway: lk.local/g:1\n  worker: lk.local/w:1\n"
        );
        assert_eq!(images.all().count(), 4);
    }

    #[test]
    fn elsewhere_every_tag_says_what_the_image_holds() {
        let moved = images().moved(&Registry::parse("r.example/team", false).unwrap());
        let references: Vec<&str> = moved.all().map(|image| image.reference.as_str()).collect();
        assert_eq!(references, ["o", "g", "w", "m"].map(|name| format!("r.example/team/{name}:0123")));
    }
}
