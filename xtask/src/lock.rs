//! Keeps two commands from making one cluster at once.

use std::fs::{self, File, TryLockError};
use std::io::{Read as _, Write as _};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::content;
use crate::paths::Paths;

/// What is read of the file that says who holds the lock.
const HOLDER: u64 = 200;

/// Held until it is dropped, and by the kernel no longer than the processes that have it.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Of a local cluster, for a command such as `up`.
    pub(crate) fn of_cluster(paths: &Paths, name: &str, command: &str) -> Result<Self> {
        Self::take(paths, name, &format!("cluster {name}"), command)
    }

    /// Of the cluster that a context of the kubeconfig names; nobody else's machine knows of it.
    pub(crate) fn of_context(paths: &Paths, context: &str, command: &str) -> Result<Self> {
        let mut key = content::sha256_of(&[context]);
        key.truncate(20);
        Self::take(paths, &format!("context-{key}"), &format!("context {context}"), command)
    }

    fn take(paths: &Paths, file: &str, what: &str, command: &str) -> Result<Self> {
        let folder = paths.cache.join("locks");
        let path = folder.join(file);
        let error = || format!("lock {}", path.display());
        fs::create_dir_all(&folder).with_context(error)?;
        // It stays: one that is removed could be locked by one command while another one makes it anew.
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(error)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                file.take(HOLDER).read_to_string(&mut holder).with_context(error)?;
                bail!("{what}: {} is running; try again once it has ended", holder.trim());
            }
            Err(TryLockError::Error(source)) => return Err(source).with_context(error),
        }
        file.set_len(0).with_context(error)?;
        writeln!(file, "cargo xtask {command}, process {},", std::process::id()).with_context(error)?;
        Ok(Self(file))
    }

    /// As the standard input of a program that reads none: the lock is held as long as it runs, also if this process is killed.
    pub(crate) fn held_by(&self) -> Result<Stdio> {
        Ok(self.0.try_clone().context("lock")?.into())
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    fn paths(cache: &Path) -> Paths {
        let nowhere = PathBuf::from("/nowhere");
        Paths { root: nowhere.clone(), cache: cache.to_owned(), target: nowhere.clone(), models: nowhere }
    }

    /// Another test that starts a program just now has all open files for a moment.
    fn eventually_taken(paths: &Paths, name: &str) -> Lock {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match Lock::of_cluster(paths, name, "up") {
                Ok(lock) => return lock,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_second_one_says_who_is_first() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        let first = Lock::of_cluster(&paths, "herd", "up").unwrap();
        let error = Lock::of_cluster(&paths, "herd", "e2e").unwrap_err().to_string();
        let holder = format!("cluster herd: cargo xtask up, process {}, is running", std::process::id());
        assert!(error.starts_with(&holder), "{error}");
        Lock::of_cluster(&paths, "other", "up").unwrap();
        Lock::of_context(&paths, "herd", "up").unwrap();
        drop(first);
        eventually_taken(&paths, "herd");
    }

    #[test]
    fn a_program_that_outlives_its_command_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        let lock = Lock::of_cluster(&paths, "herd", "up").unwrap();
        let mut helm = Command::new("sleep").arg("600").stdin(lock.held_by().unwrap()).spawn().unwrap();
        drop(lock);
        let second = Lock::of_cluster(&paths, "herd", "up");
        helm.kill().unwrap();
        helm.wait().unwrap();
        let error = second.unwrap_err().to_string();
        assert!(error.contains("is running"), "{error}");
        eventually_taken(&paths, "herd");
    }
}
