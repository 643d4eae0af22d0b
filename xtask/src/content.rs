//! Hashes of files: what is made from them is cached under such a name.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// SHA-256 of a file.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let error = || format!("read {}", path.display());
    let mut file = File::open(path).with_context(error)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(format!("{:x}", hash.finalize())),
            Ok(read) => hash.update(&buffer[..read]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).with_context(error),
        }
    }
}

/// SHA-256 of names and contents of all files below, in the order of their names; links are followed.
pub(crate) fn sha256_below(root: &Path, parts: &[&str]) -> Result<String> {
    let mut files = Vec::new();
    for part in parts {
        list_files(&root.join(part), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.strip_prefix(root).unwrap_or(&file).as_os_str().as_encoded_bytes());
        hash.update(sha256(&file)?);
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// SHA-256 of words, of which none can pass for a part of another.
pub(crate) fn sha256_of(words: &[&str]) -> String {
    let mut hash = Sha256::new();
    for word in words {
        hash.update(format!("{} ", word.len()));
        hash.update(word);
    }
    format!("{:x}", hash.finalize())
}

/// All files below.
pub(crate) fn list_files(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("read {}", path.display()))? {
        list_files(&entry?.path(), files)?;
    }
    Ok(())
}

/// Removes all but the `keep` newest of the files or folders, as far as that is possible.
pub(crate) fn prune(mut paths: Vec<PathBuf>, keep: usize) {
    let modified = |path: &PathBuf| fs::metadata(path).and_then(|data| data.modified()).ok();
    paths.sort_by_key(|path| std::cmp::Reverse(modified(path)));
    for path in paths.into_iter().skip(keep) {
        // What another process uses or removes just now is left to the next time.
        let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own, removed when dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("herd-xtask-{}-{name}", std::process::id()));
            fs::create_dir_all(&folder).unwrap();
            Self(folder)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn words_cannot_pass_for_others() {
        assert_ne!(sha256_of(&["ab", "c"]), sha256_of(&["a", "bc"]));
        assert_ne!(sha256_of(&["a 1 b"]), sha256_of(&["a", "b"]));
    }

    #[test]
    fn a_folders_hash_depends_on_names_and_contents() {
        let folder = Folder::new("hash");
        let write = |name: &str, text: &str| fs::write(folder.0.join(name), text).unwrap();
        let hash = || sha256_below(&folder.0, &["."]).unwrap();
        write("a", "1");
        let first = hash();
        write("a", "2");
        assert_ne!(hash(), first);
        write("a", "1");
        assert_eq!(hash(), first);
        fs::rename(folder.0.join("a"), folder.0.join("b")).unwrap();
        assert_ne!(hash(), first);
    }

    #[test]
    fn the_newest_stay() {
        let folder = Folder::new("prune");
        let paths: Vec<PathBuf> = (0..5).map(|n| folder.0.join(n.to_string())).collect();
        for (n, path) in paths.iter().enumerate() {
            fs::create_dir(path).unwrap();
            let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(100 - n as u64);
            File::open(path).unwrap().set_modified(time).unwrap();
        }
        prune(paths.clone(), 3);
        let left: Vec<bool> = paths.iter().map(|path| path.exists()).collect();
        assert_eq!(left, [true, true, true, false, false]);
    }
}
