//! What a generation says, in terms that both front doors encode.

/// One event of one choice. Those of a choice come in order: started, how likely the prompt is, deltas with rising positions,
/// finished.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GenerationEvent {
    pub(crate) choice: u32,
    pub(crate) kind: EventKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum EventKind {
    Started,
    Prompt(Prompt),
    Delta(Delta),
    Finished(Finished),
}

/// How likely the next tokens of the prompt are.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prompt {
    /// Of the first token, in the prompt; at least 1.
    pub(crate) position: u32,
    /// Their offsets are 0: only the text as a whole has any.
    pub(crate) tokens: Vec<TokenDetail>,
}

/// Tokens and the text they complete: ids never run ahead of the text, nor text of the ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    /// Of the first token.
    pub(crate) position: u32,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) text: String,
    /// One a token when asked for, else empty.
    pub(crate) logprobs: Vec<TokenDetail>,
}

/// A token with its log probability.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenDetail {
    pub(crate) token: TokenLogprob,
    /// Most likely first.
    pub(crate) top: Vec<TokenLogprob>,
    /// Characters of the choice's text before this token's.
    pub(crate) text_offset: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenLogprob {
    pub(crate) id: u32,
    /// The token alone; U+FFFD for parts of characters.
    pub(crate) text: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) logprob: f32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Finished {
    pub(crate) reason: FinishReason,
    /// Tokens generated, an end-of-sequence token and the tokens of a stop string included.
    pub(crate) completion_tokens: u32,
    pub(crate) cached_tokens: u32,
    /// Of the log probabilities of its tokens.
    pub(crate) logprob_sum: f64,
    /// Generated in choices of the same prompt that are left out; told with the first one that is not.
    pub(crate) discarded_tokens: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FinishReason {
    Stop,
    Length,
}

impl GenerationEvent {
    /// Takes `next` in if it goes on where this one ends; gives it back otherwise. For clients that are behind.
    pub(crate) fn absorb(&mut self, next: Self) -> Option<Self> {
        match (&mut self.kind, next) {
            (EventKind::Delta(delta), Self { choice, kind: EventKind::Delta(more) })
                if choice == self.choice =>
            {
                delta.token_ids.extend(more.token_ids);
                delta.text.push_str(&more.text);
                delta.logprobs.extend(more.logprobs);
                None
            }
            (_, next) => Some(next),
        }
    }
}
