//! Which layers stay as they are, and where activations are bounded: pure, from what was measured.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{LayerMeasurement, LinearMeasurement};
use crate::convert::Layout;

/// As Meta bounds the activations of its 405B.
pub const USUAL_BOUND: f32 = 1200.0;
/// Of a linear's outputs, with nothing clipped. e4m3 alone makes about 0.04 of any weights and activations that it suits.
pub const LARGE_ERROR: f64 = 0.1;
/// One layer in so many may stay for its massive activations; where there are more, the bound goes up instead.
const LAYERS_PER_KEPT: usize = 8;
/// Of a bound over the largest activation measured: other prompts may reach further.
const HEADROOM: f32 = 1.25;

/// What the user has chosen. It goes before what is measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ByHand {
    /// Layers that stay as they are.
    pub keep_layers: Option<BTreeSet<usize>>,
    /// Of a token's amax.
    pub bound: Option<f32>,
}

/// Why a layer stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Reason {
    /// As in Meta's 405B.
    FirstOrLast,
    /// Tokens of this linear reach beyond the bound: in FP8 they would be clipped.
    MassiveActivation {
        /// Of the seven, by its module.
        linear: String,
        /// The largest magnitude.
        amax: f32,
    },
    /// FP8 changes the outputs of this linear too much.
    LargeError {
        /// By its module.
        linear: String,
        /// Relative.
        error: f64,
    },
    /// Named by the user.
    ByHand,
}

/// Why the bound is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BoundReason {
    /// [`USUAL_BOUND`], which no token of a converted layer reaches.
    Usual,
    /// Raised, so that no token of a converted layer is clipped: too many layers have massive activations to keep them all.
    Raised,
    /// Named by the user.
    ByHand,
}

/// A bound and its reason.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// Of a token's amax.
    pub value: f32,
    /// Why.
    pub reason: BoundReason,
}

/// What [`choose`] makes of measurements.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// Layers that stay as they are.
    pub kept: BTreeMap<usize, Reason>,
    /// None in a layout without one.
    pub bound: Option<Bound>,
}

/// Chooses for `layers`, which are all of the model's, in their order.
pub fn choose(layout: Layout, layers: &[LayerMeasurement], by_hand: &ByHand) -> Choice {
    let has_bound = matches!(layout, Layout::FbgemmFp8 { .. });
    let start = if has_bound { by_hand.bound.unwrap_or(USUAL_BOUND) } else { f32::INFINITY };
    let kept = match &by_hand.keep_layers {
        Some(named) => named.iter().map(|layer| (*layer, Reason::ByHand)).collect(),
        None => kept_layers(layout, layers, start, by_hand.bound.is_some()),
    };
    let bound = has_bound.then(|| match by_hand.bound {
        Some(value) => Bound { value, reason: BoundReason::ByHand },
        None => free_bound(layers, &kept),
    });
    Choice { kept, bound }
}

fn kept_layers(
    layout: Layout,
    layers: &[LayerMeasurement],
    bound: f32,
    bound_is_fixed: bool,
) -> BTreeMap<usize, Reason> {
    let mut kept: BTreeMap<usize, Reason> = BTreeMap::new();
    for LayerMeasurement { layer, linears, seconds: _ } in layers {
        let worst = linears.iter().max_by(|a, b| a.error_unclipped.total_cmp(&b.error_unclipped));
        if let Some(LinearMeasurement { linear, error_unclipped, .. }) =
            worst.filter(|worst| worst.error_unclipped > LARGE_ERROR)
        {
            kept.insert(*layer, Reason::LargeError { linear: linear.clone(), error: *error_unclipped });
        }
    }
    let mut massive: Vec<_> =
        layers.iter().filter_map(|layer| Some((layer.layer, largest(layer)?))).collect();
    massive.retain(|(_, linear)| linear.activation_amax > bound);
    massive.sort_by(|(_, a), (_, b)| b.activation_amax.total_cmp(&a.activation_amax));
    if let Layout::FbgemmFp8 { .. } = layout {
        let ends = [layers.first(), layers.last()].into_iter().flatten();
        kept.extend(ends.map(|end| (end.layer, Reason::FirstOrLast)));
        // They stay anyway.
        massive.retain(|(layer, _)| !kept.contains_key(layer));
    }
    let most = if bound_is_fixed { usize::MAX } else { (layers.len() / LAYERS_PER_KEPT).max(1) };
    for (layer, LinearMeasurement { linear, activation_amax, .. }) in massive.into_iter().take(most) {
        kept.insert(layer, Reason::MassiveActivation { linear: linear.clone(), amax: *activation_amax });
    }
    kept
}

/// The linear whose input reaches furthest.
fn largest(layer: &LayerMeasurement) -> Option<&LinearMeasurement> {
    layer.linears.iter().max_by(|a, b| a.activation_amax.total_cmp(&b.activation_amax))
}

fn free_bound(layers: &[LayerMeasurement], kept: &BTreeMap<usize, Reason>) -> Bound {
    let converted = layers.iter().filter(|layer| !kept.contains_key(&layer.layer));
    let reached = converted.filter_map(largest).fold(0.0, |most: f32, at| most.max(at.activation_amax));
    if reached <= USUAL_BOUND {
        Bound { value: USUAL_BOUND, reason: BoundReason::Usual }
    } else {
        // Whole hundreds read better.
        let value = (reached * HEADROOM / 100.0).ceil() * 100.0;
        Bound { value, reason: BoundReason::Raised }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FBGEMM: Layout = Layout::FbgemmFp8 { activation_scale_ub: 1200.0 };

    /// Layers of one linear, by its largest activation.
    fn layers(amax: &[f32]) -> Vec<LayerMeasurement> {
        let of = |(layer, amax): (usize, &f32)| LayerMeasurement {
            layer,
            seconds: 0.0,
            linears: vec![
                LinearMeasurement::even("mlp.gate_proj", 3.0, 0.04),
                LinearMeasurement::even("mlp.down_proj", *amax, 0.04),
            ],
        };
        amax.iter().enumerate().map(of).collect()
    }

    fn choice(amax: &[f32], by_hand: &ByHand) -> (Vec<usize>, f32, BoundReason) {
        let Choice { kept, bound } = choose(FBGEMM, &layers(amax), by_hand);
        let Bound { value, reason } = bound.unwrap();
        (kept.into_keys().collect(), value, reason)
    }

    /// As SmolLM2's 30 layers are.
    fn smollm2() -> Vec<f32> {
        let mut amax = vec![100.0; 30];
        (amax[11], amax[28], amax[29]) = (3066.0, 2375.0, 476.0);
        amax
    }

    #[test]
    fn massive_layers_and_the_ends_stay() {
        assert_eq!(choice(&smollm2(), &ByHand::default()), (vec![0, 11, 28, 29], 1200.0, BoundReason::Usual));
        let Choice { kept, .. } = choose(FBGEMM, &layers(&smollm2()), &ByHand::default());
        assert_eq!(kept[&0], Reason::FirstOrLast);
        assert_eq!(kept[&11], Reason::MassiveActivation { linear: "mlp.down_proj".to_owned(), amax: 3066.0 });
        // The bound itself clips nothing.
        assert_eq!(choice(&[1.0, 1200.0, 1.0], &ByHand::default()).0, [0, 2]);
        assert_eq!(choice(&[1.0, 1200.1, 1.0], &ByHand::default()).0, [0, 1, 2]);
    }

    #[test]
    fn too_many_massive_layers_raise_the_bound() {
        let mut amax = vec![1.0; 16];
        (amax[3], amax[5], amax[7], amax[9]) = (1500.0, 9000.0, 2000.0, 8000.0);
        // Two of sixteen may stay: the largest.
        assert_eq!(choice(&amax, &ByHand::default()), (vec![0, 5, 9, 15], 2500.0, BoundReason::Raised));
        // What stays anyway is none of them.
        (amax[0], amax[15]) = (20_000.0, 20_000.0);
        assert_eq!(choice(&amax, &ByHand::default()).0, [0, 5, 9, 15]);
    }

    #[test]
    fn the_user_goes_first() {
        let keep = |layers: &[usize]| Some(layers.iter().copied().collect());
        let by_hand = ByHand { keep_layers: keep(&[1, 2]), bound: None };
        // Then 3,066 is converted.
        assert_eq!(choice(&smollm2(), &by_hand), (vec![1, 2], 3900.0, BoundReason::Raised));
        let by_hand = ByHand { keep_layers: None, bound: Some(90.0) };
        let (kept, bound, reason) = choice(&smollm2()[..12], &by_hand);
        assert_eq!((kept.len(), bound, reason), (12, 90.0, BoundReason::ByHand));
        let by_hand = ByHand { keep_layers: keep(&[4]), bound: Some(90.0) };
        assert_eq!(choice(&smollm2(), &by_hand), (vec![4], 90.0, BoundReason::ByHand));
    }

    #[test]
    fn without_a_bound_only_errors_count() {
        let mut layers = layers(&smollm2());
        let none = choose(Layout::CompressedTensors, &layers, &ByHand::default());
        assert_eq!(none, Choice { kept: BTreeMap::new(), bound: None });
        layers[4].linears[0].error_unclipped = 0.2;
        let one = choose(Layout::CompressedTensors, &layers, &ByHand::default());
        let reason = Reason::LargeError { linear: "mlp.gate_proj".to_owned(), error: 0.2 };
        assert_eq!(one.kept, BTreeMap::from([(4, reason)]));
        assert_eq!(choose(FBGEMM, &layers, &ByHand::default()).kept.len(), 5);
    }
}
