//! How long after a gang was given up the next one is made. Nothing is counted: all follows from two points in time, of the
//! first and of the last of the gangs that were given up one after another.

use herd_api::GangFailure;
use herd_api::condition::reason;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};

use crate::gang::Trouble;

/// A gang whose pod is lost is replaced this long after that at the earliest.
const SHORTEST: SignedDuration = SignedDuration::from_secs(1);
/// What a gang that was not whole held is left to others for this long at least.
const SHORTEST_AFTER_RELEASE: SignedDuration = SignedDuration::from_secs(30);
/// Up to half of it more, see [`jitter`].
const LONGEST: SignedDuration = SignedDuration::from_mins(5);
/// A gang that is given up this long after the last one has nothing to do with it.
const FORGET: SignedDuration = SignedDuration::from_mins(30);

/// A gang that is given up at `now`, or could not be made, after those of before.
pub fn failure(
    before: Option<&GangFailure>,
    revision: &str,
    trouble: &Trouble,
    now: Timestamp,
) -> GangFailure {
    let in_a_row = before
        .filter(|before| before.revision == revision && now.duration_since(before.time.0) < FORGET)
        .map(|before| before.since.clone());
    GangFailure {
        revision: revision.to_owned(),
        since: in_a_row.unwrap_or(Time(now)),
        time: Time(now),
        reason: trouble.reason.clone(),
        message: trouble.message.clone(),
    }
}

/// When the next gang of this revision is made. The pause is as long as it has gone wrong so far, so that it doubles.
pub(super) fn retry_at(failure: &GangFailure, pool: &str) -> Timestamp {
    let GangFailure { revision: _, since, time, reason, message: _ } = failure;
    let shortest = if reason == reason::UNSCHEDULABLE { SHORTEST_AFTER_RELEASE } else { SHORTEST };
    let pause = time.0.duration_since(since.0).clamp(shortest, LONGEST);
    time.0.saturating_add(pause + jitter(pause, pool, time.0)).unwrap_or(Timestamp::MAX)
}

/// Up to half of a pause, other for other pools and times: two pools that gave up at once do not try again at once.
fn jitter(pause: SignedDuration, pool: &str, time: Timestamp) -> SignedDuration {
    let digest = Sha256::digest(format!("{pool} {}", time.as_second()));
    let share = f64::from(u16::from_be_bytes([digest[0], digest[1]])) / f64::from(u16::MAX);
    SignedDuration::from_millis((pause.as_millis() as f64 * share / 2.0) as i64)
}
