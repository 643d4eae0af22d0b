//! GGUF keeps the `llama3` RoPE scaling as one factor per frequency (tensor `rope_freqs.weight`); Hugging Face's config.json
//! has the four numbers they are made from. This finds the four numbers again.

use std::f64::consts::TAU;

/// `rope_scaling` of config.json, type `llama3`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Llama3Scaling {
    pub(super) factor: f64,
    pub(super) low_freq_factor: f64,
    pub(super) high_freq_factor: f64,
    pub(super) original_context: u32,
}

impl Llama3Scaling {
    /// What each frequency of RoPE is divided by, as `transformers` computes it.
    fn divisors(&self, theta: f64, head_dim: usize) -> impl Iterator<Item = f64> {
        let original = f64::from(self.original_context);
        let Self { factor, low_freq_factor: low, high_freq_factor: high, .. } = *self;
        (0..head_dim / 2).map(move |i| {
            let wavelength = TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
    }

    /// The scaling whose divisors are `factors`. All Llama 3.1 to 3.3 models have low and high factors of 1 and 4; the
    /// original context is the power of two that fits. None when nothing does.
    pub(super) fn fit(factors: &[f32], theta: f64) -> Option<Self> {
        let factor = factors.iter().copied().fold(1.0, f32::max);
        (6..=20)
            .map(|power| Self {
                factor: f64::from(factor),
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_context: 1 << power,
            })
            .find(|scaling| {
                let divisors = scaling.divisors(theta, 2 * factors.len());
                divisors.zip(factors).all(|(a, &b)| (a - f64::from(b)).abs() <= 1e-4 * a)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_scaling_of_the_published_models() {
        for (factor, theta, head_dim, original_context) in
            [(8.0, 500_000.0, 128, 8192), (32.0, 500_000.0, 64, 8192), (8.0, 500_000.0, 32, 128)]
        {
            let scaling =
                Llama3Scaling { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context };
            let factors: Vec<f32> = scaling.divisors(theta, head_dim).map(|d| d as f32).collect();
            assert_eq!(Llama3Scaling::fit(&factors, theta), Some(scaling));
        }
    }

    #[test]
    fn refuses_factors_of_another_kind() {
        let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32 / 10.0).collect();
        assert_eq!(Llama3Scaling::fit(&factors, 10_000.0), None);
    }
}
