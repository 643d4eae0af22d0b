//! Steps that take their time: one line each when they are done, and a sign of life meanwhile.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How long a step may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// What a step is at right now.
#[derive(Default)]
pub(crate) struct Activity(Mutex<String>);

impl Activity {
    pub(crate) fn set(&self, what: &str) {
        what.clone_into(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Runs a step, which returns what it made and how it had it ("cached"), and prints a line about it.
pub(crate) fn step<T>(name: &str, run: impl FnOnce(&Activity) -> Result<(T, String)>) -> Result<T> {
    let (made, how) = alive(name, run)?;
    report(&format!("{name}: {how}"), made.1);
    Ok(made.0)
}

/// Runs a step that prints its own lines.
pub(crate) fn quietly<T>(name: &str, run: impl FnOnce(&Activity) -> Result<T>) -> Result<T> {
    Ok(alive(name, |activity| Ok((run(activity)?, String::new())))?.0.0)
}

/// Prints that something was done.
pub(crate) fn report(what: &str, took: Duration) {
    eprintln!("  {what:<40} {:6.1}s", took.as_secs_f64());
}

type Timed<T> = ((T, Duration), String);

fn alive<T>(name: &str, run: impl FnOnce(&Activity) -> Result<(T, String)>) -> Result<Timed<T>> {
    let activity = Activity::default();
    let (done, is_done) = mpsc::channel::<()>();
    let began = Instant::now();
    let result = thread::scope(|scope| {
        let activity = &activity;
        scope.spawn(move || {
            while is_done.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("  {}", still(name, began.elapsed(), &activity.get()));
            }
        });
        // Moved in, so that the other thread ends also if the step panics.
        let done = done;
        let result = run(activity);
        drop(done);
        result
    });
    let (made, how) = result.with_context(|| format!("step {name} failed"))?;
    Ok(((made, began.elapsed()), how))
}

fn still(name: &str, so_far: Duration, activity: &str) -> String {
    let seconds = so_far.as_secs();
    if activity.is_empty() {
        format!("{name}: {seconds} s so far")
    } else {
        format!("{name}: {seconds} s so far, at {activity}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_of_life_says_how_long_and_at_what() {
        assert_eq!(still("images", Duration::from_secs(61), ""), "images: 61 s so far");
        assert_eq!(
            still("binaries", Duration::from_millis(30_400), "tokio v1"),
            "binaries: 30 s so far, at tokio v1"
        );
    }

    #[test]
    fn a_failed_step_is_named() {
        let failed: Result<()> = step("images", |_| anyhow::bail!("no disk"));
        assert_eq!(format!("{:#}", failed.unwrap_err()), "step images failed: no disk");
        assert_eq!(step("images", |_| Ok((7, "cached".to_owned()))).unwrap(), 7);
    }
}
