//! One layer of an image: a tar file, the same bytes for the same content.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tar::{Builder, EntryType, Header};

/// What is in a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layer<'a> {
    /// What is below a folder, at the image's root.
    Tree(&'a Path),
    /// A file, and its absolute path in the image.
    File(&'a Path, &'a str),
    /// A layer that is written already.
    Tar(&'a Path),
}

impl Layer<'_> {
    /// Writes the tar: names in order, no times, owner 0, and of modes only who may run or enter what.
    pub(crate) fn write(self, mut to: &mut dyn Write) -> Result<()> {
        let (Self::Tree(path) | Self::File(path, _) | Self::Tar(path)) = self;
        let error = || format!("layer of {}", path.display());
        if let Self::Tar(path) = self {
            let mut layer = File::open(path).with_context(error)?;
            io::copy(&mut layer, &mut to).with_context(error)?;
            return Ok(());
        }
        let mut tar = Builder::new(to);
        match self {
            Self::Tree(path) => tree(&mut tar, path, Path::new("")),
            Self::File(path, at) => placed(&mut tar, path, at),
            Self::Tar(_) => Ok(()),
        }
        .and_then(|()| Ok(tar.finish()?))
        .with_context(error)
    }
}

/// The file with the folders above it.
fn placed<W: Write>(tar: &mut Builder<W>, path: &Path, at: &str) -> Result<()> {
    let at = Path::new(at.trim_start_matches('/'));
    let parents: Vec<&Path> = at.ancestors().skip(1).filter(|parent| parent != &Path::new("")).collect();
    for parent in parents.into_iter().rev() {
        folder(tar, parent, 0o755)?;
    }
    file(tar, path, at)
}

fn tree<W: Write>(tar: &mut Builder<W>, path: &Path, at: &Path) -> Result<()> {
    let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, at) = (entry.path(), at.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            let sticky = entry.metadata()?.permissions().mode() & 0o1000 != 0;
            folder(tar, &at, if sticky { 0o1777 } else { 0o755 })?;
            tree(tar, &path, &at)?;
        } else if kind.is_symlink() {
            let mut header = header(EntryType::Symlink, 0o777, 0);
            tar.append_link(&mut header, &at, fs::read_link(&path)?)?;
        } else if kind.is_file() {
            file(tar, &path, &at)?;
        }
    }
    Ok(())
}

fn folder<W: Write>(tar: &mut Builder<W>, at: &Path, mode: u32) -> Result<()> {
    let mut header = header(EntryType::Directory, mode, 0);
    // A folder's name ends in a slash.
    Ok(tar.append_data(&mut header, at.join(""), io::empty())?)
}

fn file<W: Write>(tar: &mut Builder<W>, path: &Path, at: &Path) -> Result<()> {
    let content = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let metadata = content.metadata()?;
    let mode = if metadata.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
    let mut header = header(EntryType::Regular, mode, metadata.len());
    Ok(tar.append_data(&mut header, at, content)?)
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// A layer as a file of its own.
pub(crate) fn write_to(path: &Path, layer: Layer<'_>) -> Result<()> {
    let fresh: PathBuf = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = File::create(&fresh)
        .with_context(|| format!("create {}", fresh.display()))
        .and_then(|mut file| layer.write(&mut file));
    if written.is_err() {
        // There is an error to tell already.
        let _ = fs::remove_file(&fresh);
    }
    written?;
    fs::rename(&fresh, path).with_context(|| format!("rename to {}", path.display()))
}
