//! When requests come, and what they ask: functions of the seed.

use std::time::Duration;

/// Arrivals of a Poisson process: each waits for the one before it a time that is distributed exponentially.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    numbers: Numbers,
    rate: f64,
    seconds: f64,
}

impl Arrivals {
    /// `rate` a second.
    pub(super) fn new(seed: u64, rate: f64) -> Self {
        Self { numbers: Numbers(seed), rate, seconds: 0.0 }
    }

    /// Of the next one.
    pub(super) fn next_after_start(&mut self) -> Duration {
        // In (0, 1], so that its logarithm is a number.
        let uniform = ((self.numbers.draw() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        self.seconds -= uniform.ln() / self.rate;
        Duration::try_from_secs_f64(self.seconds).unwrap_or(Duration::MAX)
    }
}

/// Token ids of a prompt that shares no beginning with another. They stay in the part of a vocabulary that every tokenizer
/// of bytes has.
pub(super) fn prompt(seed: u64, number: u64, tokens: u32) -> Vec<u32> {
    const FIRST: u64 = 32;
    const LAST: u64 = 223;
    let mut numbers = Numbers(seed ^ number.wrapping_add(1).wrapping_mul(0xD134_2543_DE82_EF95));
    (0..tokens).map(|_| (FIRST + numbers.draw() % (LAST - FIRST + 1)) as u32).collect()
}

/// `SplitMix64` (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_paper() {
        // Of the seed 1234567, as its reference implementation gives them.
        let mut numbers = Numbers(1_234_567);
        let drawn: Vec<u64> = (0..3).map(|_| numbers.draw()).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn arrivals_have_the_rate_and_the_spread_of_a_poisson_process() {
        let mut arrivals = Arrivals::new(7, 20.0);
        let times: Vec<f64> = (0..20_000).map(|_| arrivals.next_after_start().as_secs_f64()).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.05).abs() < 0.002, "{mean}");
        assert!((variance.sqrt() - 0.05).abs() < 0.003, "{}", variance.sqrt());
        assert!(gaps.iter().all(|gap| *gap >= 0.0));
    }

    #[test]
    fn a_seed_asks_the_same_again_and_no_two_requests_are_alike() {
        let first = |seed| Arrivals::new(seed, 1.0).next_after_start();
        assert_eq!(first(3), first(3));
        assert_ne!(first(3), first(4));
        assert_eq!(prompt(3, 5, 16), prompt(3, 5, 16));
        assert_ne!(prompt(3, 5, 16), prompt(3, 6, 16));
        assert_ne!(prompt(3, 5, 16), prompt(4, 5, 16));
        assert!(prompt(1, 2, 500).iter().all(|id| (32..=223).contains(id)));
    }
}
