//! What a request does to its logits before a token is drawn. In this order, which is that of `vLLM`: bias, stop tokens that may
//! not come yet, penalties, tokens that its grammar does not allow; then temperature, and which tokens are left to draw from.

use std::collections::{HashMap, HashSet};

use crate::{Sampling, TokenMask};

/// The default does nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shaping {
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Before so many tokens of the choice none of [`Sampling::stop_ids`] is drawn.
    pub min_tokens: usize,
    /// For tokens that have come before.
    pub penalties: Penalties,
    /// Only so many most likely tokens are drawn, equal ones by rising id; 0 is all.
    pub top_k: usize,
    /// Only tokens that are at least so likely as this share of the most likely one; 0 is all.
    pub min_p: f32,
}

/// How logits of tokens change that have come before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Of the prompt or the choice: a logit above 0 is divided by it, another one multiplied. 1 is none.
    pub repetition: f32,
    /// Taken once from the logits of tokens of the choice.
    pub presence: f32,
    /// Taken as often as a token is in the choice.
    pub frequency: f32,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { repetition: 1.0, presence: 0.0, frequency: 0.0 }
    }
}

/// Tokens of a sequence so far, as far as its penalties ask for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    prompt: HashSet<u32>,
    /// Of the choice, and how often.
    outputs: HashMap<u32, u32>,
}

impl History {
    /// Of a prompt, which ends with the first tokens of the choice where another engine began it. None: nothing asks for it.
    pub fn new(sampling: &Sampling, prompt: &[u32]) -> Option<Self> {
        if sampling.shaping.penalties == Penalties::default() {
            return None;
        }
        let (prompt, said) = prompt.split_at(prompt.len().saturating_sub(sampling.first_position));
        let mut history = Self { prompt: prompt.iter().copied().collect(), outputs: HashMap::new() };
        for token in said {
            history.push(*token);
        }
        Some(history)
    }

    /// A token of the choice.
    pub fn push(&mut self, token: u32) {
        *self.outputs.entry(token).or_default() += 1;
    }
}

/// Logits as the request has them; none where it leaves them as they are. `allowed`: by its grammar.
pub(crate) fn shaped(
    logits: &[f32],
    sampling: &Sampling,
    position: usize,
    history: Option<&History>,
    allowed: Option<&TokenMask>,
) -> Option<Vec<f32>> {
    let Shaping { bias, min_tokens, penalties, top_k: _, min_p: _ } = &sampling.shaping;
    let stop_ids = &sampling.stop_ids;
    // Where a grammar allows nothing but the end, it is the end.
    let is_early = position < *min_tokens
        && !stop_ids.is_empty()
        && allowed.is_none_or(|allowed| allowed.has_other_than(stop_ids));
    if bias.is_empty() && !is_early && history.is_none() && allowed.is_none() {
        return None;
    }
    let mut row = logits.to_vec();
    let mut change = |id: u32, with: &dyn Fn(f32) -> f32| {
        if let Some(logit) = row.get_mut(id as usize) {
            *logit = with(*logit);
        }
    };
    for (id, bias) in bias {
        change(*id, &|logit| logit + bias);
    }
    if is_early {
        for id in stop_ids {
            change(*id, &|_| f32::NEG_INFINITY);
        }
    }
    if let Some(History { prompt, outputs }) = history {
        let Penalties { repetition, presence, frequency } = *penalties;
        if repetition.to_bits() != 1.0_f32.to_bits() {
            let repeated = |logit: f32| if logit > 0.0 { logit / repetition } else { logit * repetition };
            let come = outputs.keys().chain(prompt.iter().filter(|id| !outputs.contains_key(id)));
            for id in come {
                change(*id, &repeated);
            }
        }
        for (id, count) in outputs {
            change(*id, &|logit| logit - presence - frequency * *count as f32);
        }
    }
    if let Some(allowed) = allowed {
        for (id, logit) in (0..).zip(&mut row) {
            if !allowed.contains(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    Some(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(shaping: Shaping) -> Sampling {
        Sampling {
            first_position: 0,
            max_tokens: 9,
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
            choice: 0,
            stop_ids: vec![2],
            top_logprobs: 0,
            shaping,
            constraint: None,
            prompt_logprobs: None,
        }
    }

    #[test]
    fn nothing_is_copied_where_nothing_changes() {
        let plain = sampling(Shaping { top_k: 3, min_p: 0.1, ..Shaping::default() });
        assert_eq!(History::new(&plain, &[1, 2]), None);
        assert_eq!(shaped(&[1.0; 4], &plain, 0, None, None), None);
        // The bound is on tokens of the choice, wherever it was begun.
        let early = sampling(Shaping { min_tokens: 3, ..Shaping::default() });
        assert_eq!(shaped(&[1.0; 4], &early, 3, None, None), None);
        assert_eq!(shaped(&[1.0; 4], &early, 2, None, None).unwrap(), [1.0, 1.0, f32::NEG_INFINITY, 1.0]);
    }

    #[test]
    fn penalties_are_of_what_has_come() {
        let penalties = Penalties { repetition: 2.0, presence: 0.25, frequency: 0.5 };
        let bias = vec![(5, 8.0), (99, 1.0)];
        let sampling =
            Sampling { first_position: 2, ..sampling(Shaping { bias, penalties, ..Shaping::default() }) };
        // 3 is of the prompt and of the choice, 1 of the prompt alone; the choice began with 3, 4.
        let mut history = History::new(&sampling, &[1, 3, 3, 4]).unwrap();
        history.push(4);
        history.push(0);
        let row = shaped(&[4.0, 4.0, 4.0, 4.0, -4.0, -4.0], &sampling, 4, Some(&history), None).unwrap();
        assert_eq!(row, [1.25, 2.0, 4.0, 1.25, -9.25, 4.0]);
    }

    #[test]
    fn a_grammar_comes_last_and_outranks_min_tokens() {
        let none = f32::NEG_INFINITY;
        let mut allowed = TokenMask::none(4);
        allowed.allow(2);
        let early = sampling(Shaping { min_tokens: 3, bias: vec![(1, 90.0)], ..Shaping::default() });
        // Token 2 is the stop token, and there is no other way on.
        let row = shaped(&[1.0; 4], &early, 0, None, Some(&allowed)).unwrap();
        assert_eq!(row, [none, none, 1.0, none]);
        allowed.allow(1);
        let row = shaped(&[1.0; 4], &early, 0, None, Some(&allowed)).unwrap();
        assert_eq!(row, [none, 91.0, none, none]);
        let row = shaped(&[1.0; 4], &early, 3, None, Some(&allowed)).unwrap();
        assert_eq!(row, [none, 91.0, 1.0, none]);
    }
}
