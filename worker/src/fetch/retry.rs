//! When to try again.

use std::time::Duration;

/// Tries follow each other with pauses that double, until so much time has passed without progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// The first pause.
    pub first: Duration,
    /// The longest one, unless a server asks for more.
    pub most: Duration,
    /// Since the last progress.
    pub limit: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            most: Duration::from_secs(30),
            limit: Duration::from_mins(10),
        }
    }
}

impl Retry {
    /// The pause after `tries` tries before this one; `None`: it is not worth another. `since` the last progress; `asked` by the
    /// server; `random` within 0..1 spreads those who were refused together.
    pub(super) fn pause(
        &self,
        tries: u32,
        since: Duration,
        asked: Option<Duration>,
        random: f64,
    ) -> Option<Duration> {
        let doubled = self.first.saturating_mul(1_u32.checked_shl(tries).unwrap_or(u32::MAX)).min(self.most);
        let pause = match asked {
            // Never earlier than asked for.
            Some(asked) => asked.saturating_add(self.first.mul_f64(random)).max(doubled.mul_f64(random)),
            None => doubled.mul_f64(0.5 + random / 2.0),
        };
        (since.saturating_add(pause) <= self.limit).then_some(pause)
    }
}

/// Within 0..1.
pub(super) fn random() -> f64 {
    (uuid::Uuid::new_v4().as_u128() >> 75) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Retry =
        Retry { first: Duration::from_secs(1), most: Duration::from_secs(8), limit: Duration::from_mins(1) };

    fn seconds(pause: Option<Duration>) -> Option<f64> {
        pause.map(|pause| pause.as_secs_f64())
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_are_spread() {
        let pauses: Vec<_> =
            (0..6).map(|tries| seconds(RETRY.pause(tries, Duration::ZERO, None, 1.0))).collect();
        assert_eq!(pauses, [1.0, 2.0, 4.0, 8.0, 8.0, 8.0].map(Some));
        assert_eq!(seconds(RETRY.pause(1, Duration::ZERO, None, 0.0)), Some(1.0));
        assert_eq!(seconds(RETRY.pause(u32::MAX, Duration::ZERO, None, 1.0)), Some(8.0));
        let random = random();
        assert!((0.0..1.0).contains(&random), "{random}");
    }

    #[test]
    fn a_server_that_asks_for_a_pause_gets_it() {
        let asked = |tries, asked, random| {
            seconds(RETRY.pause(tries, Duration::ZERO, Some(Duration::from_secs(asked)), random))
        };
        assert_eq!(asked(0, 20, 0.0), Some(20.0));
        assert_eq!(asked(0, 20, 1.0), Some(21.0));
        assert_eq!(asked(0, 61, 0.0), None);
    }

    #[test]
    fn it_ends_without_progress() {
        let late = |seconds| RETRY.pause(2, Duration::from_secs(seconds), None, 1.0);
        assert!(late(56).is_some() && late(57).is_none());
    }
}
