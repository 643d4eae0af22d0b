//! Ids -> bytes -> UTF-8 -> stop strings, in one pipeline.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::stop::{Passed, StopMatcher, Stops};
use crate::utf8::Utf8Decoder;
use crate::{TextError, TextModel};

/// What may be sent after one more token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// The next text: whole characters, no part of a stop string that is not to be in the output, no control token. Often
    /// empty.
    pub text: String,
    /// How many tokens, from the oldest not yet counted, are wholly in the text so far. Ids and logprobs sent by this count
    /// stay in step with the text. Once `stopped`, tokens never counted are of the stop string alone.
    pub tokens: usize,
    /// A stop string is complete: what follows is not part of the output, nor is it unless asked for.
    pub stopped: bool,
}

/// The text of one choice, as its tokens come.
///
/// The pieces together with [`OutputStream::finish`] are what decoding all ids in one go and cutting at the first stop string
/// gives. A control token has no text and ends a character that has begun. Bytes that are not UTF-8 become U+FFFD as soon as
/// that is certain.
pub struct OutputStream {
    model: Arc<TextModel>,
    utf8: Utf8Decoder,
    stops: StopMatcher,
    /// Bytes of text decoded so far, and of it sent.
    decoded: usize,
    sent: usize,
    /// Characters of text decoded so far, and where the last token's own text begins among them.
    characters: usize,
    begin: usize,
    /// Tokens not yet counted: where each one's text begins, and how much must have been sent for it to be whole.
    pending: VecDeque<(usize, usize)>,
    /// Tokens that have yet to come before a stop string counts.
    held_back: usize,
    stopped: bool,
}

impl OutputStream {
    /// Fails if there are more than [`crate::MAX_STOPS`] stop strings, an empty one, or one longer than
    /// [`crate::MAX_STOP_BYTES`].
    pub fn new(model: &Arc<TextModel>, stops: impl Into<Stops>) -> Result<Self, TextError> {
        let Stops { strings, included, min_tokens } = stops.into();
        Ok(Self {
            model: Arc::clone(model),
            utf8: Utf8Decoder::default(),
            stops: StopMatcher::new(strings, included)?,
            decoded: 0,
            sent: 0,
            characters: 0,
            begin: 0,
            pending: VecDeque::new(),
            held_back: min_tokens,
            stopped: false,
        })
    }

    /// Takes the next token. An id that the tokenizer does not have (padding rows of an embedding) has no text. After
    /// `stopped` nothing more comes.
    pub fn push(&mut self, id: u32) -> Piece {
        self.take(id, true)
    }

    /// Takes a token that ended the choice and whose text is not part of the output.
    pub fn push_stop(&mut self, id: u32) -> Piece {
        self.take(id, false)
    }

    fn take(&mut self, id: u32, has_text: bool) -> Piece {
        if self.stopped {
            return Piece { stopped: true, ..Piece::default() };
        }
        let mut text = String::new();
        let model = Arc::clone(&self.model);
        let bytes = model.vocabulary().text_bytes(id).filter(|_| has_text);
        let earlier = if let Some(bytes) = bytes {
            self.utf8.push(bytes, &mut text)
        } else {
            self.utf8.flush(&mut text);
            text.len()
        };
        self.begin = self.characters + text[..earlier].chars().count();
        self.characters += text.chars().count();
        let begin = self.decoded;
        self.decoded += text.len();
        // A character that has begun will be one byte of text at least, and is sent whole.
        self.pending.push_back((begin, self.decoded + usize::from(self.utf8.inside_character())));
        let may_stop = self.held_back == 0;
        self.held_back = self.held_back.saturating_sub(1);
        let Passed { text, stopped } = self.stops.push(&text, may_stop);
        self.stopped = stopped;
        self.sent += text.len();
        let sent = self.sent;
        let tokens = self
            .pending
            .iter()
            .take_while(|&&(begin, whole)| whole <= sent || (stopped && begin < sent))
            .count();
        self.pending.drain(..tokens);
        Piece { text, tokens, stopped }
    }

    /// Characters of the text before what the last token pushed is part of, stop strings or not. A U+FFFD that only says that
    /// an earlier token ended in half a character is before it.
    pub fn token_begin(&self) -> usize {
        self.begin
    }

    /// No more tokens will come: what was held back. All tokens not yet counted go with it.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        self.stopped = true;
        let mut last = String::new();
        self.utf8.flush(&mut last);
        let Passed { mut text, stopped } = self.stops.push(&last, self.held_back == 0);
        if !stopped {
            text.push_str(&self.stops.finish());
        }
        text
    }
}
