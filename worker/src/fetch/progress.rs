//! How far a download is, for whoever reads the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// Between log lines.
const EVERY: Duration = Duration::from_secs(10);

/// Bytes of a model that are there.
#[derive(Debug)]
pub(super) struct Progress {
    total: u64,
    done: AtomicU64,
}

impl Progress {
    pub(super) fn new(total: u64, done: u64) -> Self {
        Self { total, done: AtomicU64::new(done) }
    }

    pub(super) fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// They have to come once more.
    pub(super) fn take_back(&self, bytes: u64) {
        let _ = self
            .done
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |done| Some(done.saturating_sub(bytes)));
    }

    /// Runs `task` and says from time to time how far it is.
    pub(super) async fn told<T>(&self, what: &str, task: impl Future<Output = T>) -> T {
        let mut task = std::pin::pin!(task);
        let mut ticks = interval_at(Instant::now() + EVERY, EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = self.done.load(Ordering::Relaxed);
        loop {
            tokio::select! {
                ended = &mut task => return ended,
                _ = ticks.tick() => {
                    let done = self.done.load(Ordering::Relaxed);
                    tracing::info!("{}", line(what, self.total, before, done, EVERY));
                    before = done;
                }
            }
        }
    }
}

fn line(what: &str, total: u64, before: u64, done: u64, passed: Duration) -> String {
    let rate = done.saturating_sub(before) as f64 / passed.as_secs_f64();
    let left = total.saturating_sub(done) as f64 / rate;
    let eta = if rate > 0.0 { format!("{left:.0} s left") } else { "nothing came".to_owned() };
    format!("downloading {what}: {} of {}, {}/s, {eta}", size(done), size(total), size(rate as u64))
}

/// "1.5 GB".
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_bytes_rate_and_time_left() {
        let line = |before, done| line("hf://a/b", 4_000_000_000, before, done, Duration::from_secs(10));
        assert_eq!(
            line(500_000_000, 1_000_000_000),
            "downloading hf://a/b: 1.0 GB of 4.0 GB, 50.0 MB/s, 60 s left"
        );
        assert_eq!(line(7, 7), "downloading hf://a/b: 7 bytes of 4.0 GB, 0 bytes/s, nothing came");
        let progress = Progress::new(10, 4);
        progress.add(3);
        progress.take_back(9);
        assert_eq!(progress.done.into_inner(), 0);
    }

    #[tokio::test]
    async fn what_the_task_gives_is_given_back() {
        assert_eq!(Progress::new(10, 0).told("x", async { 7 }).await, 7);
    }
}
