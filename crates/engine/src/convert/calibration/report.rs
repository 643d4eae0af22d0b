//! A calibration as a person reads it, and as a program does.

use std::fmt::{self, Display, Formatter};

use serde_json::{Value as Json, json};

use super::{Bound, BoundReason, Calibration, Choice, LayerMeasurement, LinearMeasurement, Reason};
use crate::convert::Layout;

/// Name of the report within the checkpoint that was made by it.
pub const REPORT_FILE: &str = "quantization_report.json";

impl Calibration {
    pub(super) fn to_json(&self, layout: Layout) -> Json {
        let mut report = json!(self);
        report["layout"] = json!(layout.name());
        report
    }
}

/// A line a layer, then the choice.
impl Display for Calibration {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { prompts, tokens, layers, choice } = self;
        let Choice { kept, bound } = choice;
        writeln!(f, "calibrated on {prompts} prompts of {tokens} tokens")?;
        writeln!(f, "  LAYER  WEIGHT AMAX  ACTIVATION AMAX  OF MODULE             CLIPPED   ERROR     TIME")?;
        for LayerMeasurement { layer, seconds, linears } in layers {
            let weight = linears.iter().fold(0.0, |most: f32, linear| most.max(linear.weight_amax));
            let furthest = linears.iter().max_by(|a, b| a.activation_amax.total_cmp(&b.activation_amax));
            let (module, amax) = furthest.map_or(("-", 0.0), |at| (at.linear.as_str(), at.activation_amax));
            let clipped = linears.iter().fold(0.0, |most: f64, linear| most.max(linear.clipped));
            write!(f, "  {layer:5}  {weight:11.3}  {amax:15.1}  {module:18}  {:7.2} %", 100.0 * clipped)?;
            let error = linears.iter().map(worst_error).fold(0.0, f64::max);
            write!(f, "  {:4.1} %  {seconds:5.1} s", 100.0 * error)?;
            match kept.get(layer) {
                Some(reason) => writeln!(f, "  stays: {reason}")?,
                None => writeln!(f)?,
            }
        }
        let names: Vec<_> = kept.keys().map(ToString::to_string).collect();
        match names.len() {
            0 => write!(f, "no layer stays as it is")?,
            1 => write!(f, "layer {} stays as it is", names.concat())?,
            _ => write!(f, "layers {} stay as they are", names.join(", "))?,
        }
        let Some(Bound { value, reason }) = bound else { return Ok(()) };
        let converted = layers.iter().filter(|layer| !kept.contains_key(&layer.layer));
        let reached = converted
            .flat_map(|layer| &layer.linears)
            .fold(0.0, |most: f32, linear| most.max(linear.activation_amax));
        write!(f, "; activations are bounded at {value}: ")?;
        match reason {
            BoundReason::Usual => write!(f, "as in Meta's 405B, where others reach {reached:.1}"),
            BoundReason::Raised => {
                write!(f, "others reach {reached:.1}, in too many layers for all of them to stay")
            }
            BoundReason::ByHand => write!(f, "as you say, where others reach {reached:.1}"),
        }
    }
}

fn worst_error(linear: &LinearMeasurement) -> f64 {
    linear.error.unwrap_or(linear.error_unclipped)
}

impl Display for Reason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstOrLast => f.write_str("the first and the last do, as in Meta's 405B"),
            Self::MassiveActivation { linear, amax } => {
                write!(f, "massive activations, {amax:.1} into {linear}")
            }
            Self::LargeError { linear, error } => {
                write!(f, "FP8 changes {linear} by {:.1} %", 100.0 * error)
            }
            Self::ByHand => f.write_str("you say so"),
        }
    }
}
