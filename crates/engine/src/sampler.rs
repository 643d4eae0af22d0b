//! From a row of logits to a token. What is drawn depends on the logits, the sampling parameters, the tokens that came before and
//! (seed, choice, position) alone: the same on every gang, in any batch, after any resume.

use std::cmp::Ordering;

use crate::exp::exp_or_zero;
use crate::philox::uniform;
use crate::shaping::shaped;
use crate::{Constraint, ConstraintError, History, SampledToken, Sampling, Shaping, TokenLogprob, TokenMask};

/// Logits that are looked at side by side.
const LANES: usize = 16;

/// Logits no token can be drawn from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The forward pass went wrong.
    #[error("the logit of token {id} is not a number")]
    NotANumber {
        /// The first such token.
        id: u32,
    },
    /// No token, or one that is infinitely likely.
    #[error("the largest logit is not finite")]
    NotFinite,
    /// Its constraint cannot go on.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
}

/// Draws the token at `position` from a row of logits.
///
/// The logits are shaped first, see [`Shaping`]; of what has come before `history` tells, where the penalties ask. Tokens that
/// are not `allowed` are left out then. Temperature divides them, `top_k` and `min_p` leave the most likely tokens, and of
/// these `top_p` the smallest set of most likely ones whose probability reaches it, equal ones by rising id. Log probabilities
/// are of the logits as they are, before all of it.
pub fn sample(
    logits: &[f32],
    sampling: &Sampling,
    position: usize,
    history: Option<&History>,
    allowed: Option<&TokenMask>,
) -> Result<SampledToken, SampleError> {
    let (id, max) = choose(logits, sampling, position, history, allowed)?;
    let (logprob, top) = logprobs_from(logits, max, id, sampling.top_logprobs);
    Ok(SampledToken { position, token: TokenLogprob { id, logprob }, top })
}

/// The token that [`sample`] draws, and the largest logit.
pub(crate) fn choose(
    logits: &[f32],
    sampling: &Sampling,
    position: usize,
    history: Option<&History>,
    allowed: Option<&TokenMask>,
) -> Result<(u32, f32), SampleError> {
    let raw = largest(logits)?;
    let shaped = shaped(logits, sampling, position, history, allowed);
    let (row, (argmax, max)) = match &shaped {
        Some(row) => (row.as_slice(), largest(row)?),
        None => (logits, raw),
    };
    let id = if sampling.temperature > 0.0 {
        draw(row, max, sampling, uniform(sampling.seed, sampling.choice, position))
    } else {
        argmax
    };
    Ok((id, raw.1))
}

/// The log probability of a token, and the most likely ones, most likely first.
pub(crate) fn logprobs(logits: &[f32], id: u32, top: usize) -> Result<(f32, Vec<TokenLogprob>), SampleError> {
    let (_, max) = largest(logits)?;
    Ok(logprobs_from(logits, max, id, top))
}

fn logprobs_from(logits: &[f32], max: f32, id: u32, top: usize) -> (f32, Vec<TokenLogprob>) {
    let normalizer = log_sum_exp(logits, max);
    let logprob = |id: u32| (f64::from(logits[id as usize]) - normalizer) as f32;
    let top = most_likely(logits, top).into_iter().map(|id| TokenLogprob { id, logprob: logprob(id) });
    (logprob(id), top.collect())
}

/// [`sample`] under a constraint, if there is one, which takes the token. Says whether the choice ends with it.
pub(crate) fn sample_next(
    logits: &[f32],
    sampling: &Sampling,
    position: usize,
    history: Option<&History>,
    constraint: Option<&mut Box<dyn Constraint>>,
) -> Result<(SampledToken, bool), SampleError> {
    let Some(constraint) = constraint else {
        let sampled = sample(logits, sampling, position, history, None)?;
        let stop = sampling.stop_ids.contains(&sampled.token.id);
        return Ok((sampled, stop));
    };
    let mut allowed = constraint.allowed()?;
    if constraint.can_end() {
        for id in &sampling.stop_ids {
            allowed.allow(*id);
        }
    }
    let sampled = sample(logits, sampling, position, history, Some(&allowed))?;
    let stop = is_end(&sampling.stop_ids, constraint, sampled.token.id)?;
    Ok((sampled, stop))
}

/// Gives `token` to the constraint, and says whether the choice ends with it.
pub(crate) fn is_end(
    stop_ids: &[u32],
    constraint: &mut Box<dyn Constraint>,
    token: u32,
) -> Result<bool, ConstraintError> {
    if stop_ids.contains(&token) {
        return Ok(true);
    }
    constraint.advance(token)?;
    Ok(constraint.is_complete())
}

/// The largest logit and the lowest id that has it.
fn largest(logits: &[f32]) -> Result<(u32, f32), SampleError> {
    let (vectors, rest) = logits.as_chunks::<LANES>();
    let (mut most, mut is_nan) = ([f32::NEG_INFINITY; LANES], [false; LANES]);
    for vector in vectors {
        for lane in 0..LANES {
            is_nan[lane] |= vector[lane].is_nan();
            most[lane] = if vector[lane] > most[lane] { vector[lane] } else { most[lane] };
        }
    }
    let max = most.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    if (is_nan.contains(&true) || rest.iter().any(|logit| logit.is_nan()))
        && let Some(id) = logits.iter().position(|logit| logit.is_nan())
    {
        return Err(SampleError::NotANumber { id: id as u32 });
    }
    match logits.iter().position(|logit| *logit >= max) {
        Some(id) if max.is_finite() => Ok((id as u32, max)),
        _ => Err(SampleError::NotFinite),
    }
}

fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let (vectors, rest) = logits.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for vector in vectors {
        for lane in 0..LANES {
            sums[lane] += f64::from(exp_or_zero(vector[lane] - max));
        }
    }
    let rest: f64 = rest.iter().map(|logit| f64::from(exp_or_zero(logit - max))).sum();
    f64::from(max) + (sums.iter().sum::<f64>() + rest).ln()
}

/// Most likely first, equal ones by rising id: a total order as long as nothing is NaN.
fn by_likelihood(logits: &[f32], a: u32, b: u32) -> Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// The `count` most likely ids, most likely first.
fn most_likely(logits: &[f32], count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count < ids.len() {
        ids.select_nth_unstable_by(count, |&a, &b| by_likelihood(logits, a, b));
        ids.truncate(count);
    }
    ids.sort_unstable_by(|&a, &b| by_likelihood(logits, a, b));
    ids
}

/// Inverts the cumulative distribution at `number`, which lies in `[0, 1)`.
fn draw(logits: &[f32], max: f32, sampling: &Sampling, number: f64) -> u32 {
    let top_p = f64::from(sampling.top_p);
    let &Shaping { top_k, min_p, .. } = &sampling.shaping;
    // That of the most likely token is 1.
    let weights: Vec<f32> =
        logits.iter().map(|logit| exp_or_zero((logit - max) / sampling.temperature)).collect();
    let weight = |id: u32| f64::from(weights[id as usize]);
    let all = || 0..logits.len() as u32;
    let mut left = if top_k == 0 { logits.len() } else { top_k };
    if min_p > 0.0 {
        left = left.min(all().filter(|id| weight(*id) >= f64::from(min_p)).count());
    }
    if left < logits.len() {
        let mut ids = most_likely(logits, left.max(1));
        let total: f64 = ids.iter().map(|&id| weight(id)).sum();
        if let Some(last) = reaches(&ids, weight, total * top_p) {
            ids.truncate(last + 1);
        }
        let total = ids.iter().map(|&id| weight(id)).sum::<f64>();
        return invert(ids.iter().copied(), weight, total * number);
    }
    let total: f64 = all().map(weight).sum();
    if top_p < 1.0 {
        let nucleus = nucleus(logits, weight, total * top_p);
        let total = nucleus.iter().map(|&id| weight(id)).sum::<f64>();
        invert(nucleus.iter().copied(), weight, total * number)
    } else {
        invert(all(), weight, total * number)
    }
}

/// The first id at which the running sum of weights passes `target`; where rounding keeps the sum below it, the last id
/// that has a weight.
fn invert(ids: impl Iterator<Item = u32>, weight: impl Fn(u32) -> f64, target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = 0;
    for id in ids {
        let weight = weight(id);
        if weight > 0.0 {
            last = id;
        }
        sum += weight;
        if sum > target {
            break;
        }
    }
    last
}

/// Where the running sum of weights reaches `enough`.
fn reaches(ids: &[u32], weight: impl Fn(u32) -> f64, enough: f64) -> Option<usize> {
    let mut sum = 0.0;
    ids.iter().position(|&id| {
        sum += weight(id);
        sum >= enough
    })
}

/// The shortest run of most likely ids whose weights reach `enough`, most likely first; one at least.
fn nucleus(logits: &[f32], weight: impl Fn(u32) -> f64, enough: f64) -> Vec<u32> {
    // A vocabulary is long and a nucleus short, so sorting everything is the exception.
    let mut count = 64;
    loop {
        let mut ids = most_likely(logits, count);
        match reaches(&ids, &weight, enough) {
            Some(last) => {
                ids.truncate(last + 1);
                return ids;
            }
            None if count >= logits.len() => return ids,
            None => count *= 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Penalties;

    const SAMPLING: Sampling = Sampling {
        first_position: 0,
        max_tokens: 1,
        temperature: 1.0,
        top_p: 1.0,
        seed: 0x5eed,
        choice: 0,
        stop_ids: Vec::new(),
        top_logprobs: 0,
        shaping: Shaping {
            bias: Vec::new(),
            min_tokens: 0,
            penalties: Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 },
            top_k: 0,
            min_p: 0.0,
        },
        constraint: None,
        prompt_logprobs: None,
    };

    fn sample(logits: &[f32], sampling: &Sampling, position: usize) -> Result<SampledToken, SampleError> {
        super::sample(logits, sampling, position, None, None)
    }

    /// Pearson's statistic of `draws` tokens against the probabilities they should have.
    fn chi_square(logits: &[f32], sampling: &Sampling, expected: &[f64], draws: usize) -> f64 {
        let mut counts = vec![0_u32; logits.len()];
        for position in 0..draws {
            counts[sample(logits, sampling, position).unwrap().token.id as usize] += 1;
        }
        let term = |(&count, &p): (&u32, &f64)| {
            let mean = p * draws as f64;
            if mean == 0.0 {
                assert_eq!(count, 0, "a token without probability was drawn");
                return 0.0;
            }
            (f64::from(count) - mean).powi(2) / mean
        };
        counts.iter().zip(expected).map(term).sum()
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / total).collect()
    }

    const LOGITS: [f32; 8] = [0.0, 1.5, -1.0, 2.0, 0.5, 1.0, -0.5, 0.25];

    #[test]
    fn greedy_takes_the_lowest_of_equal_ids() {
        let sampling = Sampling { temperature: 0.0, top_logprobs: 3, ..SAMPLING };
        let sampled = sample(&[0.0, 2.0, 1.0, 2.0], &sampling, 5).unwrap();
        assert_eq!((sampled.position, sampled.token.id), (5, 1));
        assert_eq!(sampled.top.iter().map(|top| top.id).collect::<Vec<_>>(), [1, 3, 2]);
    }

    #[test]
    fn log_probabilities_are_of_the_raw_logits() {
        let sampling = Sampling { temperature: 0.3, top_p: 0.2, top_logprobs: 8, ..SAMPLING };
        let sampled = sample(&LOGITS, &sampling, 0).unwrap();
        let expected = softmax(&LOGITS, 1.0);
        assert_eq!(sampled.top.len(), 8);
        for token in sampled.top.iter().chain([&sampled.token]) {
            assert!((f64::from(token.logprob) - expected[token.id as usize].ln()).abs() < 1e-6);
        }
        assert!(sampled.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        let shifted = LOGITS.map(|logit| logit + 1000.0);
        let sampled = sample(&shifted, &sampling, 0).unwrap();
        assert!((f64::from(sampled.token.logprob) - expected[sampled.token.id as usize].ln()).abs() < 1e-3);
    }

    /// 7 degrees of freedom: a right sampler stays below 24.3 in 999 of 1000 seeds, and this seed is fixed.
    #[test]
    fn tokens_follow_the_distribution() {
        for (temperature, seed) in [(1.0, 1), (0.5, 2), (2.0, 3)] {
            let sampling = Sampling { temperature, seed, ..SAMPLING };
            let statistic = chi_square(&LOGITS, &sampling, &softmax(&LOGITS, f64::from(temperature)), 20_000);
            assert!(statistic < 24.3, "{statistic} at temperature {temperature}");
            let wrong = softmax(&LOGITS, f64::from(temperature) * 1.1);
            assert!(chi_square(&LOGITS, &sampling, &wrong, 20_000) > 24.3, "the test has no power");
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_that_reaches_top_p() {
        // Probabilities 0.38, 0.23, 0.14 ... : 0.6 is reached by the second, 0.7 by the third.
        let p = softmax(&LOGITS, 1.0);
        for (top_p, ids) in [(0.6, vec![3, 1]), (0.7, vec![3, 1, 5]), (0.001, vec![3])] {
            let total: f64 = ids.iter().map(|&id: &usize| p[id]).sum();
            let mut expected = vec![0.0; LOGITS.len()];
            for &id in &ids {
                expected[id] = p[id] / total;
            }
            let sampling = Sampling { top_p, ..SAMPLING };
            let statistic = chi_square(&LOGITS, &sampling, &expected, 10_000);
            assert!(statistic < 13.9, "{statistic} at top_p {top_p}");
        }
    }

    #[test]
    fn top_k_and_min_p_leave_the_most_likely_and_top_p_is_of_these() {
        // Probabilities 0.38, 0.23, 0.14, 0.085 ... of ids 3, 1, 5, 4 ...; of the largest, 0.61, 0.37, 0.22 ...
        let p = softmax(&LOGITS, 1.0);
        for (top_k, min_p, top_p, ids) in [
            (2, 0.0, 1.0, vec![3, 1]),
            (0, 0.3, 1.0, vec![3, 1, 5]),
            (2, 0.3, 1.0, vec![3, 1]),
            (100, 0.5, 1.0, vec![3, 1]),
            // Of 0.62 + 0.38 the first reaches 0.6; of all tokens it would take two.
            (2, 0.0, 0.6, vec![3]),
            (0, 0.3, 0.8, vec![3, 1]),
            (1, 0.0, 1.0, vec![3]),
        ] {
            let total: f64 = ids.iter().map(|&id: &usize| p[id]).sum();
            let mut expected = vec![0.0; LOGITS.len()];
            for &id in &ids {
                expected[id] = p[id] / total;
            }
            let shaping = Shaping { top_k, min_p, ..Shaping::default() };
            let sampling = Sampling { top_p, shaping, ..SAMPLING };
            let statistic = chi_square(&LOGITS, &sampling, &expected, 10_000);
            assert!(statistic < 13.9, "{statistic} at top_k {top_k}, min_p {min_p}, top_p {top_p}");
        }
    }

    #[test]
    fn log_probabilities_are_of_logits_that_nothing_has_shaped() {
        let shaping = Shaping { bias: vec![(2, 100.0)], ..Shaping::default() };
        let sampling = Sampling { top_logprobs: 1, temperature: 0.0, shaping, ..SAMPLING };
        let sampled = sample(&LOGITS, &sampling, 0).unwrap();
        assert_eq!((sampled.token.id, sampled.top[0].id), (2, 3));
        let expected = softmax(&LOGITS, 1.0)[2].ln();
        assert!((f64::from(sampled.token.logprob) - expected).abs() < 1e-6);
        // What is forbidden is not drawn, also where nothing is left.
        let all = (0..8).map(|id| (id, f32::NEG_INFINITY)).collect();
        let none = Sampling { shaping: Shaping { bias: all, ..Shaping::default() }, ..SAMPLING };
        assert_eq!(sample(&LOGITS, &none, 0).unwrap_err(), SampleError::NotFinite);
    }

    #[test]
    fn a_wide_nucleus_is_searched_to_its_end() {
        let flat = vec![1.0_f32; 1000];
        let nucleus = nucleus(&flat, |_| 1.0, 700.0);
        assert_eq!(nucleus, (0..700).collect::<Vec<u32>>());
        let sampling = Sampling { top_p: 0.7, ..SAMPLING };
        assert!((0..500).all(|position| sample(&flat, &sampling, position).unwrap().token.id < 701));
    }

    #[test]
    fn a_masked_token_is_never_drawn() {
        let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        for position in 0..100 {
            assert_eq!(sample(&logits, &SAMPLING, position).unwrap().token.id, 1);
        }
    }

    #[test]
    fn what_is_drawn_depends_on_seed_choice_and_position_only() {
        let flat = [0.0_f32; 512];
        let ids = |sampling: &Sampling| -> Vec<u32> {
            (0..32).map(|position| sample(&flat, sampling, position).unwrap().token.id).collect()
        };
        let first = ids(&SAMPLING);
        assert_eq!(first, ids(&Sampling { top_logprobs: 5, max_tokens: 9, ..SAMPLING }));
        assert_ne!(first, ids(&Sampling { seed: 1, ..SAMPLING }));
        assert_ne!(first, ids(&Sampling { choice: 1, ..SAMPLING }));
        let mut distinct = first;
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() > 24);
    }

    #[test]
    fn bad_logits_are_an_error() {
        let error = |logits: &[f32]| sample(logits, &SAMPLING, 0).unwrap_err();
        assert_eq!(error(&[0.0, f32::NAN, f32::NAN]), SampleError::NotANumber { id: 1 });
        assert_eq!(error(&[0.0, f32::INFINITY]), SampleError::NotFinite);
        assert_eq!(error(&[f32::NEG_INFINITY; 2]), SampleError::NotFinite);
        assert_eq!(error(&[]), SampleError::NotFinite);
    }
}
