//! The number format of activations and KV.

use std::fmt;
use std::str::FromStr;

/// Of activations that enter bf16 weights, and of the KV cache. Weights keep the format they are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// The reference: nothing is rounded below 32 bits.
    F32,
    /// Half the KV memory.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// A word that is no [`Dtype`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {0:?}; it is f32 or bf16")]
pub struct UnknownDtype(String);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(word: &str) -> Result<Self, UnknownDtype> {
        match word {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_dtypes_are_inverse() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
        }
        assert_eq!(
            "fp16".parse::<Dtype>().unwrap_err().to_string(),
            "unknown dtype \"fp16\"; it is f32 or bf16"
        );
    }
}
