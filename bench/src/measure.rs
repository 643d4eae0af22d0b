//! Figures out of samples.

use std::time::Duration;

/// Samples of one quantity.
#[derive(Debug, Default, Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// In microseconds.
    pub(crate) fn add_micros(&mut self, duration: Duration) {
        self.add(duration.as_secs_f64() * 1e6);
    }

    pub(crate) fn append(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// The sample that this part of all is at or below: nearest rank. `NaN` where there is none.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (part * sorted.len() as f64).ceil().max(1.0) as usize;
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan());
        for value in [4.0, 1.0, 3.0, 2.0] {
            samples.add(value);
        }
        for (part, expected) in [(0.0, 1.0), (0.5, 2.0), (0.99, 4.0), (1.0, 4.0)] {
            assert!((samples.quantile(part) - expected).abs() < f64::EPSILON, "{part}");
        }
    }
}
