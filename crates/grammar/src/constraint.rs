//! The state of one choice under a grammar.

use herd_engine::{Constraint, ConstraintError, TokenMask};
use llguidance::Matcher;

use crate::GrammarError;
use crate::error::reason;

/// What llguidance says where no token can come next.
const NO_TOKEN: &str = "NoExtensionBias";

/// A choice's place in a grammar.
pub struct GrammarConstraint {
    matcher: Matcher,
    kind: &'static str,
    vocab_size: usize,
    can_end: bool,
    complete: bool,
    /// Of the next token, where it is known already.
    allowed: Option<TokenMask>,
}

impl std::fmt::Debug for GrammarConstraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { matcher: _, kind, vocab_size: _, can_end, complete, allowed: _ } = self;
        f.debug_struct("GrammarConstraint")
            .field("kind", kind)
            .field("can_end", can_end)
            .field("complete", complete)
            .finish_non_exhaustive()
    }
}

impl GrammarConstraint {
    pub(crate) fn new(
        matcher: Matcher,
        kind: &'static str,
        vocab_size: usize,
        said: &[u32],
    ) -> Result<Self, GrammarError> {
        let mut constraint =
            Self { matcher, kind, vocab_size, can_end: false, complete: false, allowed: None };
        for (position, &token) in said.iter().enumerate() {
            let not_followed = |reason| GrammarError::NotFollowed { kind, position, reason };
            let taken = constraint.matcher.try_consume_tokens(&[token]);
            let taken = taken.map_err(|error| not_followed(reason(&error)))?;
            if taken == 0 {
                return Err(not_followed(format!("token {token} is not allowed")));
            }
        }
        let unusable = |ConstraintError(reason): ConstraintError| match said.len() {
            0 => GrammarError::Bad { kind, reason },
            position => GrammarError::NotFollowed { kind, position, reason },
        };
        constraint.settle().map_err(unusable)?;
        if !constraint.complete && constraint.allowed().map_err(unusable)?.is_empty() {
            return Err(unusable(constraint.stuck()));
        }
        Ok(constraint)
    }

    /// Finds out how the text stands after a token.
    fn settle(&mut self) -> Result<(), ConstraintError> {
        self.allowed = None;
        self.can_end = self.matcher.is_accepting().map_err(|error| self.failed(&error))?;
        self.complete = self.can_end && (self.matcher.is_stopped() || self.mask()?.is_empty());
        Ok(())
    }

    fn mask(&mut self) -> Result<&TokenMask, ConstraintError> {
        if self.allowed.is_none() {
            let mask = if self.matcher.is_stopped() {
                TokenMask::none(self.vocab_size)
            } else {
                // Past the vocabulary is the id that stands for the end.
                let mask = self.matcher.compute_mask().map_err(|error| self.failed(&error))?;
                TokenMask::from_words(mask.as_slice(), self.vocab_size)
            };
            self.allowed = Some(mask);
        }
        self.allowed.as_ref().ok_or_else(|| self.stuck())
    }

    fn failed(&self, error: &impl ToString) -> ConstraintError {
        match reason(error).as_str() {
            NO_TOKEN => self.stuck(),
            reason => ConstraintError(format!("the {} cannot go on: {reason}", self.kind)),
        }
    }

    fn stuck(&self) -> ConstraintError {
        ConstraintError(format!("the {} allows no token of this model's vocabulary", self.kind))
    }
}

impl Constraint for GrammarConstraint {
    fn allowed(&mut self) -> Result<TokenMask, ConstraintError> {
        self.mask().cloned()
    }

    fn can_end(&self) -> bool {
        self.can_end
    }

    fn is_complete(&self) -> bool {
        self.complete
    }

    fn advance(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(token).map_err(|error| self.failed(&error))?;
        self.settle()
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            matcher: self.matcher.deep_clone(),
            kind: self.kind,
            vocab_size: self.vocab_size,
            can_end: self.can_end,
            complete: self.complete,
            allowed: self.allowed.clone(),
        })
    }
}
