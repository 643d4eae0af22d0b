//! The layer below every program: Debian's C library and certificates.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::Layer;
use super::layer;
use crate::content;

/// What a dynamic program of the GNU target needs.
const PACKAGES: [&str; 3] = ["libc6", "libgcc-s1", "ca-certificates"];

/// Parts of the packages that no such program reads; `*` is one folder.
const DROPS: [&str; 8] = [
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/man",
    "usr/lib/*/gconv",
    "usr/lib/*/audit",
    "usr/sbin",
    "usr/share/ca-certificates",
];

const FILES: [(&str, &str); 3] = [
    ("etc/passwd", "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n"),
    ("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
];

const CERTIFICATES: &str = "usr/share/ca-certificates/mozilla";
const BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";

/// The layer's file, made once for each version of the packages.
pub(crate) fn layer(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let layer = folder.join(format!("base-{}.tar", key()?));
    if !layer.is_file() {
        let work = Work::new(folder)?;
        let root = work.0.join("root");
        unpack(&work.0, &root)?;
        complete(&root)?;
        layer::write_to(&layer, Layer::Tree(&root))?;
    }
    Ok(layer)
}

/// Of the packages' contents and this recipe.
fn key() -> Result<String> {
    let mut show = Command::new("apt-cache");
    show.args(["show", "--no-all-versions"]).args(PACKAGES);
    let shown = output(show)?;
    let mut words: Vec<&str> = shown.lines().filter(|line| line.starts_with("SHA256:")).collect();
    ensure!(
        words.len() == PACKAGES.len(),
        "apt-cache knows {} of the packages {}: apt-get update fetches the lists",
        words.len(),
        PACKAGES.join(" ")
    );
    // The way a layer is written.
    words.push("1");
    words.extend(DROPS);
    words.extend(FILES.iter().flat_map(|(name, text)| [*name, *text]));
    let mut key = content::sha256_of(&words);
    key.truncate(20);
    Ok(key)
}

fn unpack(work: &Path, root: &Path) -> Result<()> {
    let mut download = Command::new("apt-get");
    // Its own user for downloads may not write here.
    download.args(["download", "-o", "APT::Sandbox::User="]).args(PACKAGES).current_dir(work);
    output(download)?;
    for entry in fs::read_dir(work).with_context(|| format!("read {}", work.display()))? {
        let package = entry?.path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            let mut unpack = Command::new("dpkg");
            unpack.arg("-x").arg(&package).arg(root);
            output(unpack)?;
        }
    }
    Ok(())
}

/// Does what the packages' scripts would, and drops what is not needed.
fn complete(root: &Path) -> Result<()> {
    let folder = root.join(CERTIFICATES);
    let error = || format!("read {}", folder.display());
    let entries = fs::read_dir(&folder).with_context(error)?.collect::<std::io::Result<Vec<_>>>();
    let mut certificates: Vec<PathBuf> =
        entries.with_context(error)?.iter().map(fs::DirEntry::path).collect();
    certificates.sort();
    let mut bundle = Vec::new();
    for certificate in certificates {
        bundle.extend(fs::read(&certificate).with_context(|| format!("read {}", certificate.display()))?);
    }
    for pattern in DROPS {
        for path in matches(root, pattern)? {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    write(&root.join(BUNDLE), &bundle)?;
    for (name, text) in FILES {
        write(&root.join(name), text.as_bytes())?;
    }
    let tmp = root.join("tmp");
    fs::create_dir_all(&tmp)
        .and_then(|()| fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)))
        .with_context(|| format!("create {}", tmp.display()))
}

/// What is there of a pattern.
fn matches(root: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let Some((before, after)) = pattern.split_once("/*/") else {
        return Ok([root.join(pattern)].into_iter().filter(|path| path.exists()).collect());
    };
    let folder = root.join(before);
    let mut paths = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        paths.push(entry?.path().join(after));
    }
    Ok(paths.into_iter().filter(|path| path.exists()).collect())
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, content))
        .with_context(|| format!("write {}", path.display()))
}

fn output(mut command: Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => bail!("the base layer is made of Debian packages, and {name} cannot be run: {error}"),
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "base layer: {name} ended with {}: {}", output.status, errors.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A folder that is not to stay.
struct Work(PathBuf);

impl Work {
    fn new(folder: &Path) -> Result<Self> {
        let work = folder.join(format!(".base-{}", std::process::id()));
        fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
        Ok(Self(work))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What stays is in the cache, where it is in nobody's way.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_do_not_read_is_dropped() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for name in ["usr/lib/x/gconv/a", "usr/lib/x/libc.so", "usr/share/doc/d"] {
            write(&at(name), b"").unwrap();
        }
        for name in ["b.crt", "a.crt"] {
            write(&at(CERTIFICATES).join(name), name.as_bytes()).unwrap();
        }
        complete(root.path()).unwrap();
        assert_eq!(fs::read_to_string(at(BUNDLE)).unwrap(), "a.crtb.crt");
        assert!(at("usr/lib/x/libc.so").exists() && at("etc/passwd").exists() && at("tmp").exists());
        for gone in ["usr/lib/x/gconv", "usr/share/doc", "usr/share/ca-certificates"] {
            assert!(!at(gone).exists(), "{gone}");
        }
    }
}
