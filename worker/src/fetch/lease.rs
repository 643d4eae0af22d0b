//! What a worker holds of the model it serves, so that nobody removes it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::interval;

use super::locks::{Share, lock};

/// While a model is being removed, which is then downloaded again by nobody: the worker fails, and says what is missing.
const WAIT: Duration = Duration::from_secs(10);
/// Far below the time for which a model counts as in use after it was.
const TOUCH_EVERY: Duration = Duration::from_mins(1);

/// Held as long as the worker lives.
#[derive(Debug)]
pub struct ModelLease {
    file: File,
    touching: JoinHandle<()>,
}

impl ModelLease {
    /// Of this file, which who downloaded the model has made.
    pub async fn hold(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !lock(&file, Share::Shared, WAIT, || {}).await? {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "the model is being removed"));
        }
        let touched = file.try_clone()?;
        let touching = tokio::spawn(async move {
            let mut ticks = interval(TOUCH_EVERY);
            loop {
                ticks.tick().await;
                if let Err(error) = touched.set_modified(SystemTime::now()) {
                    tracing::warn!("the time of the model's lease cannot be written: {error}");
                }
            }
        });
        Ok(Self { file, touching })
    }
}

impl Drop for ModelLease {
    fn drop(&mut self) {
        self.touching.abort();
        // The task may hold the file a little longer.
        let _ = self.file.unlock();
    }
}
