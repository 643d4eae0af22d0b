//! What can be wrong with a grammar, in words for the client who sent it.

/// A grammar that cannot be used, or tokens that do not follow it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// More text than is compiled.
    #[error("the {kind} has {bytes} bytes; at most {limit} are read")]
    TooLarge {
        /// What it is.
        kind: &'static str,
        /// Its size.
        bytes: usize,
        /// [`crate::MAX_GRAMMAR_BYTES`].
        limit: usize,
    },
    /// No text to choose from.
    #[error("choice is empty; it needs at least one text")]
    NoChoices,
    /// It does not parse, asks for what is not supported, matches nothing, or compiles to more than is allowed.
    #[error("the {kind} cannot be used: {reason}")]
    Bad {
        /// What it is.
        kind: &'static str,
        /// Why, cut to a readable length.
        reason: String,
    },
    /// Tokens of the choice that the grammar does not allow there.
    #[error("token {position} of the choice does not follow the {kind}: {reason}")]
    NotFollowed {
        /// What it is.
        kind: &'static str,
        /// Counted from the first token of the choice.
        position: usize,
        /// Why, cut to a readable length.
        reason: String,
    },
    /// The vocabulary cannot be used; no fault of the client.
    #[error("the vocabulary cannot be used for grammars: {0}")]
    Vocabulary(String),
}

/// Characters of a reason that are passed on.
const MAX_REASON: usize = 500;

/// The library's words without its state dump, cut.
pub(crate) fn reason(error: &impl ToString) -> String {
    let text = error.to_string();
    let text = match text.split("\n<").next().unwrap_or_default().trim() {
        // The library's own mistake, on text that it should have refused.
        text if text.starts_with("panic: ") => "it is of a form that cannot be compiled",
        text => text,
    };
    match text.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text.to_owned(),
    }
}
