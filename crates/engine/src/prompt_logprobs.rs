//! How likely the tokens of a prompt are, each after those before it.

use crate::sampler::{SampleError, logprobs};
use crate::{SampledToken, TokenLogprob};

/// Of the tokens that come after those of the positions from `start` on, whose logits these are: `vocab_size` a row. The first
/// token of a prompt comes after nothing and is left out; what comes after the last one is no part of it.
pub(crate) fn prompt_logprobs(
    logits: &[f32],
    vocab_size: usize,
    start: usize,
    prompt: &[u32],
    top: usize,
) -> Result<Vec<SampledToken>, SampleError> {
    let known = prompt.get(start + 1..).unwrap_or_default();
    let rows = logits.chunks_exact(vocab_size).zip(known).zip(start + 1..);
    rows.map(|((row, &id), position)| {
        let (logprob, top) = logprobs(row, id, top)?;
        Ok(SampledToken { position, token: TokenLogprob { id, logprob }, top })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_about_the_token_after_it() {
        let prompt = [2, 0, 1];
        let logits = [3.0, 1.0, 2.0, 0.0, 5.0, 0.0, 9.0, 9.0, 9.0];
        let whole = prompt_logprobs(&logits, 3, 0, &prompt, 2).unwrap();
        let at: Vec<_> = whole.iter().map(|token| (token.position, token.token.id)).collect();
        assert_eq!(at, [(1, 0), (2, 1)]);
        let total = 1.0_f32.exp() + 2.0_f32.exp() + 3.0_f32.exp();
        assert!((whole[0].token.logprob - (3.0 - total.ln())).abs() < 1e-6);
        assert_eq!(whole[0].top.iter().map(|token| token.id).collect::<Vec<_>>(), [0, 2]);
        let mut cut = prompt_logprobs(&logits[..3], 3, 0, &prompt, 2).unwrap();
        cut.extend(prompt_logprobs(&logits[3..], 3, 1, &prompt, 2).unwrap());
        assert_eq!(cut, whole);
        assert!(prompt_logprobs(&[f32::NAN; 3], 3, 0, &prompt, 0).is_err());
        assert_eq!(prompt_logprobs(&[f32::NAN; 3], 3, 2, &prompt, 0).unwrap(), []);
    }
}
