//! Prompt lookup: text repeats itself, and what it is asked about most of all.

/// Tokens that have to be the same before a guess, at least: one alone follows from nothing.
const SHORTEST: usize = 2;

/// More of them say nothing more.
const LONGEST: usize = 8;

/// What followed where the last tokens stood before: where most of them did, up to [`LONGEST`], and there the last time. Where
/// that reaches into the last tokens themselves it goes on in circles.
pub(super) fn follows(tokens: &[u32], count: usize) -> Vec<u32> {
    let Some((&last, before)) = tokens.split_last().filter(|_| count > 0) else { return Vec::new() };
    let (mut best, mut best_end) = (SHORTEST - 1, None);
    for (end, _) in before.iter().enumerate().rev().filter(|(_, token)| **token == last) {
        let same = |(one, other): &(&u32, &u32)| one == other;
        let length =
            tokens[..=end].iter().rev().zip(tokens.iter().rev()).take(LONGEST).take_while(same).count();
        if length > best {
            (best, best_end) = (length, Some(end));
            if length == LONGEST {
                break;
            }
        }
    }
    let Some(end) = best_end else { return Vec::new() };
    let period = tokens.len() - 1 - end;
    (0..count).map(|at| tokens[end + 1 + at % period]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_longest_and_then_the_last_equal_run() {
        assert_eq!(follows(&[1, 2, 3, 4, 9, 2, 3], 2), [4, 9]);
        assert_eq!(follows(&[1, 2, 3, 4, 2, 3, 5, 9, 2, 3], 2), [5, 9], "the last of equals");
        assert_eq!(follows(&[1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 2), [4, 2], "the longer one");
        let long: Vec<u32> = (0..20).chain([50]).chain(1..20).chain([60]).chain(2..20).collect();
        assert_eq!(follows(&long, 1), [60], "of those that are long enough the last");
    }

    #[test]
    fn one_token_that_is_the_same_says_nothing() {
        for (tokens, count) in [(&[1, 2, 9, 2][..], 3), (&[], 3), (&[7], 3), (&[7, 7, 7], 0)] {
            assert!(follows(tokens, count).is_empty(), "{tokens:?}");
        }
    }

    #[test]
    fn what_repeats_goes_on() {
        assert_eq!(follows(&[7, 7, 7], 4), [7, 7, 7, 7]);
        assert_eq!(follows(&[1, 2, 3, 1, 2, 3, 1, 2], 5), [3, 1, 2, 3, 1]);
    }
}
