//! Locks of files, which the kernel gives back when their holder dies, in whatever container it was.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Between looks for a lock that another process has.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// With others, or alone.
#[derive(Clone, Copy)]
pub(super) enum Share {
    Shared,
    Alone,
}

/// The file that is locked, made where it is not there.
pub(super) fn lock_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// Whether it was to be had at once.
pub(super) fn try_lock(file: &File, share: Share) -> io::Result<bool> {
    let locked = match share {
        Share::Shared => file.try_lock_shared(),
        Share::Alone => file.try_lock(),
    };
    match locked {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Waits for it; false where that took too long.
pub(super) async fn lock(
    file: &File,
    share: Share,
    wait: Duration,
    mut waits: impl FnMut(),
) -> io::Result<bool> {
    let began = Instant::now();
    let mut told = false;
    while !try_lock(file, share)? {
        if began.elapsed() >= wait {
            return Ok(false);
        }
        if !told {
            waits();
            told = true;
        }
        sleep(LOOK_AGAIN).await;
    }
    Ok(true)
}
