//! An OCI layout folder with one image.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{INDEX, MANIFEST};

/// The folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout(PathBuf);

/// A file of the layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) media_type: String,
    /// `sha256:` and 64 digits.
    pub(crate) digest: String,
    pub(crate) size: u64,
}

impl Blob {
    pub(crate) fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.size})
    }

    fn from(descriptor: &Value) -> Option<Self> {
        let text = |field: &str| descriptor[field].as_str().map(str::to_owned);
        Some(Self {
            media_type: text("mediaType")?,
            digest: text("digest")?,
            size: descriptor["size"].as_u64()?,
        })
    }
}

/// What an image consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) manifest: Blob,
    pub(crate) config: Blob,
    pub(crate) layers: Vec<Blob>,
}

impl Layout {
    /// A new one.
    pub(crate) fn create(folder: &Path) -> Result<Self> {
        let layout = Self(folder.to_owned());
        let blobs = layout.blobs();
        fs::create_dir_all(&blobs).with_context(|| format!("create {}", blobs.display()))?;
        layout.write("oci-layout", &json!({"imageLayoutVersion": "1.0.0"}))?;
        Ok(layout)
    }

    /// One that is there.
    pub(crate) fn open(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// Where a blob is.
    pub(crate) fn path(&self, digest: &str) -> Result<PathBuf> {
        match digest.strip_prefix("sha256:") {
            Some(sum) if sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Ok(self.blobs().join(sum))
            }
            _ => bail!("digest {digest:?} is not sha256: and 64 digits"),
        }
    }

    /// Stores what `write` writes.
    pub(crate) fn add(
        &self,
        media_type: &str,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<Blob> {
        let fresh = self.0.join(".blob");
        let error = || format!("write {}", fresh.display());
        let file = File::create(&fresh).with_context(error)?;
        let mut file = Hashed { file: io::BufWriter::new(file), hash: Sha256::new(), size: 0 };
        write(&mut file)?;
        file.flush().with_context(error)?;
        let blob = Blob {
            media_type: media_type.to_owned(),
            digest: format!("sha256:{:x}", file.hash.finalize()),
            size: file.size,
        };
        let path = self.path(&blob.digest)?;
        fs::rename(&fresh, &path).with_context(|| format!("rename to {}", path.display()))?;
        Ok(blob)
    }

    /// Stores JSON.
    pub(crate) fn add_json(&self, media_type: &str, value: &Value) -> Result<Blob> {
        self.add(media_type, |to| Ok(serde_json::to_writer(to, value)?))
    }

    /// Names the image, which is what makes the layout whole.
    pub(crate) fn name(&self, reference: &str, manifest: &Blob, platform: &Value) -> Result<()> {
        let (_, tag) = reference.rsplit_once(':').with_context(|| format!("{reference} has no tag"))?;
        let mut descriptor = manifest.descriptor();
        descriptor["platform"] = platform.clone();
        descriptor["annotations"] = json!({
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]});
        self.write("index.json", &index)
    }

    /// The image.
    pub(crate) fn image(&self) -> Result<Parts> {
        let index = Self::read(&self.0.join("index.json"))?;
        let manifest = index["manifests"].get(0).and_then(Blob::from);
        let manifest = manifest.with_context(|| format!("{} lists no image", self.0.display()))?;
        ensure!(manifest.media_type == MANIFEST, "{} is of type {}", manifest.digest, manifest.media_type);
        let content = Self::read(&self.path(&manifest.digest)?)?;
        let config = Blob::from(&content["config"]);
        let layers = content["layers"].as_array().map(|layers| layers.iter().map(Blob::from).collect());
        let (Some(config), Some(Some(layers))) = (config, layers) else {
            bail!("manifest {} of {} is not one of an image", manifest.digest, self.0.display())
        };
        Ok(Parts { manifest, config, layers })
    }

    fn blobs(&self) -> PathBuf {
        self.0.join("blobs/sha256")
    }

    fn write(&self, name: &str, value: &Value) -> Result<()> {
        let path = self.0.join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("write {}", path.display()))
    }

    fn read(path: &Path) -> Result<Value> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
    }
}

/// A file whose digest is known once it is written.
struct Hashed<W> {
    file: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
