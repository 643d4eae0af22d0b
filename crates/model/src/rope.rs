//! Rotary position embedding: the inverse frequency of each pair of a head's lanes.

use std::f64::consts::TAU;

/// How positions turn the lanes of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Llama 3.1's stretching of long wavelengths; none: plain.
    pub scaling: Option<Llama3Scaling>,
}

/// `rope_type: llama3`. Wavelengths above `original_context / low_freq_factor` grow by `factor`, those below
/// `original_context / high_freq_factor` stay, those between are blended.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Of the longest wavelengths.
    pub factor: f64,
    /// Ends the fully stretched band.
    pub low_freq_factor: f64,
    /// Starts the band that is left as it is; above `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Context of the model before it was stretched, in tokens.
    pub original_context: usize,
}

impl Rope {
    /// One inverse frequency a pair: lanes `i` and `i + head_dim / 2` turn by `position * inv_freq[i]` radians. Every
    /// intermediate result is rounded to f32, as in the published implementation.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / head_dim as f32;
                let plain = 1.0 / (self.theta.powf(f64::from(exponent)) as f32);
                self.scaling.as_ref().map_or(plain, |scaling| scaling.stretch(plain))
            })
            .collect()
    }
}

impl Llama3Scaling {
    fn stretch(&self, plain: f32) -> f32 {
        let Self { factor, low_freq_factor, high_freq_factor, original_context } = *self;
        let original = original_context as f64;
        let wavelength = TAU as f32 / plain;
        if wavelength > (original / low_freq_factor) as f32 {
            return plain / factor as f32;
        }
        if wavelength < (original / high_freq_factor) as f32 {
            return plain;
        }
        let smooth = (original as f32 / wavelength - low_freq_factor as f32)
            / (high_freq_factor - low_freq_factor) as f32;
        (1.0 - smooth) * plain / factor as f32 + smooth * plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_wavelengths_stay_and_long_ones_grow() {
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = Rope { theta: 500_000.0, scaling: None }.inverse_frequencies(128);
        let scaled = Rope { theta: 500_000.0, scaling: Some(scaling) }.inverse_frequencies(128);
        assert_eq!(scaled[..16], plain[..16]);
        assert_eq!(scaled[63..], [plain[63] / 8.0]);
        assert!(scaled.iter().zip(&plain).all(|(scaled, plain)| (plain / 8.0..=*plain).contains(scaled)));
    }
}
