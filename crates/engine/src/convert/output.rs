//! An output directory that appears whole or not at all.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{ConvertError, Progress};

/// Checksums of every other file of an output directory, in the format of `sha256sum`.
pub const SUMS_FILE: &str = "SHA256SUMS";

/// A file that was written, with its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSum {
    /// Name within the output directory.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, in lower-case hexadecimal.
    pub sha256: String,
}

/// A directory beside the target that takes its place on [`OutputDirectory::commit`] and is removed when dropped before.
///
/// It is locked: a second conversion into the same target is refused, and what a killed one left is cleared by the next.
#[derive(Debug)]
pub(super) struct OutputDirectory {
    target: PathBuf,
    parent: PathBuf,
    staging: PathBuf,
    /// Where the model that is replaced stands between two renames.
    replaced: PathBuf,
    force: bool,
    committed: bool,
    _lock: File,
}

impl OutputDirectory {
    /// Refuses a `target` that exists and is not empty, unless `force` is set and it is a model directory.
    pub(super) fn create(target: &Path, force: bool) -> Result<Self, ConvertError> {
        let (Some(name), Some(parent)) = (target.file_name(), target.parent()) else {
            return Err(ConvertError::output(target, "the output needs a directory name of its own"));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        fs::create_dir_all(parent).map_err(ConvertError::io("create", parent))?;
        let name = name.to_string_lossy();
        let staging = parent.join(format!(".{name}.partial"));
        let lock = lock_directory(&staging, target)?;
        let output = Self {
            target: target.to_owned(),
            parent: parent.to_owned(),
            staging,
            replaced: parent.join(format!(".{name}.replaced")),
            force,
            committed: false,
            _lock: lock,
        };
        output.finish_earlier_replacement()?;
        check_target(target, force)?;
        Ok(output)
    }

    /// A replacement that was killed between its renames has moved the old model away, or not removed it yet.
    fn finish_earlier_replacement(&self) -> Result<(), ConvertError> {
        let Self { target, replaced, .. } = self;
        if !replaced.exists() {
            return Ok(());
        }
        if target.exists() {
            fs::remove_dir_all(replaced).map_err(ConvertError::io("remove", replaced))
        } else {
            fs::rename(replaced, target).map_err(ConvertError::io("move back", replaced))
        }
    }

    /// Where the file `name` is to be written.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.staging.join(name)
    }

    pub(super) fn write(&self, name: &str, content: &[u8]) -> Result<(), ConvertError> {
        let path = self.file(name);
        fs::write(&path, content).map_err(ConvertError::io("write", &path))
    }

    pub(super) fn copy(&self, from: &Path, name: &str) -> Result<(), ConvertError> {
        let content = fs::read(from).map_err(ConvertError::io("read", from))?;
        self.write(name, &content)
    }

    /// Flushes every file to disk, reads it back for its checksum, writes [`SUMS_FILE`] and renames the directory.
    pub(super) fn commit(mut self, progress: &dyn Progress) -> Result<Vec<FileSum>, ConvertError> {
        let staging = self.staging.as_path();
        let mut names = Vec::new();
        let mut total = 0;
        for entry in fs::read_dir(staging).map_err(ConvertError::io("read", staging))? {
            let entry = entry.map_err(ConvertError::io("read", staging))?;
            total += entry.metadata().map_err(ConvertError::io("stat", &entry.path()))?.len();
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        progress.stage("checksums", total);
        let mut sums = Vec::with_capacity(names.len());
        for name in names {
            let path = staging.join(&name);
            sums.push(sync_and_sum(&path, name, progress)?);
        }
        let listing: Vec<_> = sums.iter().map(|sum| format!("{}  {}\n", sum.sha256, sum.name)).collect();
        self.write(SUMS_FILE, listing.concat().as_bytes())?;
        sync(&self.file(SUMS_FILE))?;
        sync(staging)?;
        self.take_place()?;
        Ok(sums)
    }

    fn take_place(&mut self) -> Result<(), ConvertError> {
        let Self { target, parent, staging, replaced, force, committed, _lock } = self;
        // Looked at again: the target may have been filled since.
        let replace = check_target(target, *force)?;
        if replace {
            fs::rename(&target, &replaced).map_err(ConvertError::io("move away", target))?;
        }
        if let Err(error) = fs::rename(staging, &target) {
            if replace {
                fs::rename(&replaced, &target).map_err(ConvertError::io("move back", replaced))?;
            }
            return Err(ConvertError::io("rename to", target)(error));
        }
        *committed = true;
        sync(parent)?;
        if replace {
            fs::remove_dir_all(&replaced).map_err(ConvertError::io("remove", replaced))?;
        }
        Ok(())
    }
}

impl Drop for OutputDirectory {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = fs::remove_dir_all(&self.staging)
        {
            tracing::warn!(path = %self.staging.display(), %error, "cannot remove the unfinished output");
        }
    }
}

/// Whether something has to be replaced, or why `target` cannot be written.
fn check_target(target: &Path, force: bool) -> Result<bool, ConvertError> {
    let entries = match fs::read_dir(target) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ConvertError::io("read", target)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(ConvertError::io("read", target))?;
        let kind = entry.file_type().map_err(ConvertError::io("stat", &entry.path()))?;
        names.push((entry.file_name(), kind.is_dir()));
    }
    if names.is_empty() {
        return Ok(false);
    }
    if !force {
        return Err(ConvertError::output(
            target,
            "exists and is not empty: choose another --out, or pass --force",
        ));
    }
    let is_model =
        names.iter().any(|(name, _)| name == "config.json") && names.iter().all(|(_, is_dir)| !is_dir);
    if !is_model {
        return Err(ConvertError::output(
            target,
            "--force replaces model directories only, and this is none",
        ));
    }
    Ok(true)
}

/// Makes and locks an empty directory at `staging`.
fn lock_directory(staging: &Path, target: &Path) -> Result<File, ConvertError> {
    // Taking over a directory that its owner renames or removes at this moment: look again, a few times.
    for _ in 0..8 {
        match fs::create_dir(staging) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(ConvertError::io("create", staging)(error));
            }
            _ => {}
        }
        let Ok(directory) = File::open(staging) else { continue };
        if directory.try_lock().is_err() {
            break;
        }
        let held = directory.metadata().map_err(ConvertError::io("stat", staging))?;
        if !fs::metadata(staging).is_ok_and(|now| (now.dev(), now.ino()) == (held.dev(), held.ino())) {
            continue;
        }
        for entry in fs::read_dir(staging).map_err(ConvertError::io("read", staging))? {
            let path = entry.map_err(ConvertError::io("read", staging))?.path();
            fs::remove_file(&path).map_err(ConvertError::io("remove", &path))?;
        }
        return Ok(directory);
    }
    Err(ConvertError::output(target, "another conversion is writing it"))
}

fn sync(path: &Path) -> Result<(), ConvertError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(ConvertError::io("flush", path))
}

fn sync_and_sum(path: &Path, name: String, progress: &dyn Progress) -> Result<FileSum, ConvertError> {
    sync(path)?;
    let mut file = File::open(path).map_err(ConvertError::io("read", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer).map_err(ConvertError::io("read", path))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
        progress.advance(read as u64);
    }
    Ok(FileSum { name, bytes, sha256: format!("{:x}", hash.finalize()) })
}

#[cfg(test)]
mod tests {
    use super::super::NoProgress;
    use super::*;

    fn listing(path: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn appears_whole_with_checksums() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        let output = OutputDirectory::create(&target, false).unwrap();
        output.write("config.json", b"abc").unwrap();
        assert!(!target.exists());
        let sums = output.commit(&NoProgress).unwrap();
        // FIPS 180-2, example 1.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sums, [FileSum { name: "config.json".into(), bytes: 3, sha256: sha256.into() }]);
        assert_eq!(fs::read_to_string(target.join(SUMS_FILE)).unwrap(), format!("{sha256}  config.json\n"));
        assert_eq!(listing(root.path()), ["model"]);
    }

    #[test]
    fn leaves_nothing_when_dropped_and_clears_what_a_killed_one_left() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        fs::create_dir(root.path().join(".model.partial")).unwrap();
        fs::write(root.path().join(".model.partial/stale"), b"stale").unwrap();
        let output = OutputDirectory::create(&target, false).unwrap();
        assert_eq!(listing(&root.path().join(".model.partial")), [""; 0]);
        output.write("config.json", b"{}").unwrap();
        drop(output);
        assert_eq!(listing(root.path()), [""; 0]);
    }

    #[test]
    fn one_conversion_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        let first = OutputDirectory::create(&target, false).unwrap();
        let second = OutputDirectory::create(&target, false).unwrap_err();
        assert!(second.to_string().ends_with("another conversion is writing it"), "{second}");
        drop(first);
        OutputDirectory::create(&target, false).unwrap();
    }

    #[test]
    fn brings_back_a_model_whose_replacement_was_killed() {
        let root = tempfile::tempdir().unwrap();
        let (target, replaced) = (root.path().join("model"), root.path().join(".model.replaced"));
        fs::create_dir(&replaced).unwrap();
        fs::write(replaced.join("config.json"), b"old").unwrap();
        drop(OutputDirectory::create(&target, true).unwrap());
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"old");

        // Killed after the second rename.
        fs::create_dir(&replaced).unwrap();
        drop(OutputDirectory::create(&target, true).unwrap());
        assert_eq!(listing(root.path()), ["model"]);
    }

    #[test]
    fn replaces_only_a_model_and_only_by_force() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        fs::create_dir(&target).unwrap();
        drop(OutputDirectory::create(&target, false).unwrap());
        fs::write(target.join("letters.txt"), b"dear").unwrap();
        let error = OutputDirectory::create(&target, false).unwrap_err();
        assert!(error.to_string().contains("pass --force"), "{error}");
        let error = OutputDirectory::create(&target, true).unwrap_err();
        assert!(error.to_string().contains("model directories only"), "{error}");

        fs::write(target.join("config.json"), b"old").unwrap();
        let output = OutputDirectory::create(&target, true).unwrap();
        output.write("config.json", b"new").unwrap();
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"old");
        output.commit(&NoProgress).unwrap();
        assert_eq!(listing(&target), [SUMS_FILE, "config.json"]);
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"new");
        assert_eq!(listing(root.path()), ["model"]);
    }
}
