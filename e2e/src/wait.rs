//! Waits on a state of the cluster.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at what cannot be watched.
const INTERVAL: Duration = Duration::from_millis(250);

/// A point in time that a wait ends at.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// This long from now.
    pub fn after(within: Duration) -> Self {
        Self(Instant::now() + within)
    }

    /// Until then; zero once it is over.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether no time is left.
    pub fn is_over(self) -> bool {
        self.left().is_zero()
    }

    /// Until the next look, or the end.
    pub(crate) fn pause(self) {
        thread::sleep(INTERVAL.min(self.left()));
    }
}

/// Looks until `look` gives `Ok`; its last error says what was seen instead.
pub fn eventually<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Deadline::after(within);
    loop {
        match look() {
            Ok(seen) => return Ok(seen),
            Err(error) if deadline.is_over() => {
                bail!("waited {} s for {what}; last: {error:#}", within.as_secs())
            }
            Err(_) => deadline.pause(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_told() {
        let mut looks = 0;
        let error = eventually("rain", Duration::ZERO, || -> Result<()> {
            looks += 1;
            bail!("sun {looks}")
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "waited 0 s for rain; last: sun 1");
    }

    #[test]
    fn it_looks_again() {
        let mut looks = 0;
        let seen = eventually("the second", Duration::from_mins(1), || {
            looks += 1;
            if looks == 2 { Ok(looks) } else { bail!("not yet") }
        });
        assert_eq!(seen.unwrap(), 2);
    }
}
