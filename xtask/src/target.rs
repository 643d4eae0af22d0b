//! The target folder that clones share.
//!
//! Cargo names what it builds of a workspace by paths within it, and tells by the age of the sources whether it is built already.
//! So what two clones build has the same names, and the clone whose files are older would run what the other one built.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::paths::Paths;
use crate::step::run;

/// In the target folder: the root of the clone that built last.
const BUILT_BY: &str = ".built-by";

/// Makes the folder this clone's: where another one built last, what it built of its own crates goes. Dependencies stay.
pub(crate) fn take(paths: &Paths) -> Result<()> {
    if paths.target.starts_with(&paths.root) {
        return Ok(());
    }
    let built_by = paths.target.join(BUILT_BY);
    let root = paths.root.as_os_str().as_encoded_bytes();
    if fs::read(&built_by).is_ok_and(|last| last == root) {
        return Ok(());
    }
    fs::create_dir_all(&paths.target).with_context(|| format!("create {}", paths.target.display()))?;
    let (success, output) = run(paths.cargo(&["clean", "--release", "--workspace"]));
    ensure!(success, "{}", output.trim_end());
    fs::write(&built_by, root).with_context(|| format!("write {}", built_by.display()))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::time::{Duration, SystemTime};

    use super::*;

    /// Removed at the end of the test.
    struct Folder(PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A clone whose program says its name, in files of an hour ago.
    fn clone(folder: &Path, name: &str) -> Paths {
        let root = folder.join(name);
        let write = |file: &str, text: &str| {
            fs::write(root.join(file), text).unwrap();
            let then = SystemTime::now() - Duration::from_hours(1);
            fs::File::options().append(true).open(root.join(file)).unwrap().set_modified(then).unwrap();
        };
        fs::create_dir_all(root.join("src")).unwrap();
        write("Cargo.toml", "[workspace]\n[package]\nname = \"program\"\nedition = \"2024\"\n");
        write("src/main.rs", &format!("fn main() {{ println!(\"this is {name}\"); }}\n"));
        let under = |name: &str| folder.join(name);
        Paths { root, cache: under("cache"), target: under("target"), models: under("models") }
    }

    #[test]
    fn a_clone_does_not_run_what_another_one_built() {
        let folder = Folder(std::env::temp_dir().join(format!("herd-xtask-target-{}", std::process::id())));
        let clones = [clone(&folder.0, "one"), clone(&folder.0, "two")];
        for paths in [&clones[0], &clones[1], &clones[0]] {
            take(paths).unwrap();
            let (success, output) = run(paths.cargo(&["run", "--release", "--offline"]));
            let name = paths.root.file_name().unwrap().display();
            assert!(success && output.contains(&format!("\nthis is {name}\n")), "{output}");
        }
        take(&clones[0]).unwrap();
        let (_, output) = run(clones[0].cargo(&["build", "--release", "--offline"]));
        assert!(!output.contains("Compiling"), "its own is built once: {output}");
    }
}
