//! Ids -> bytes -> UTF-8 -> stop strings, in one pipeline.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::stop::{Passed, StopMatcher};
use crate::utf8::Utf8Decoder;
use crate::{TextError, TextModel};

/// What may be sent after one more token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// The next text: whole characters, no part of a stop string, no control token. Often empty.
    pub text: String,
    /// How many tokens, from the oldest not yet counted, are wholly in the text so far. Ids and logprobs sent by this count
    /// stay in step with the text. Once `stopped`, tokens never counted are of the stop string alone.
    pub tokens: usize,
    /// A stop string is complete: it and what follows are not part of the output.
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
    stopped: bool,
}

impl OutputStream {
    /// Fails if there are more than [`crate::MAX_STOPS`] stop strings, an empty one, or one longer than
    /// [`crate::MAX_STOP_BYTES`].
    pub fn new(model: &Arc<TextModel>, stops: Vec<String>) -> Result<Self, TextError> {
        Ok(Self {
            model: Arc::clone(model),
            utf8: Utf8Decoder::default(),
            stops: StopMatcher::new(stops)?,
            decoded: 0,
            sent: 0,
            characters: 0,
            begin: 0,
            pending: VecDeque::new(),
            stopped: false,
        })
    }

    /// Takes the next token. An id that the tokenizer does not have (padding rows of an embedding) has no text. After
    /// `stopped` nothing more comes.
    pub fn push(&mut self, id: u32) -> Piece {
        if self.stopped {
            return Piece { stopped: true, ..Piece::default() };
        }
        let mut text = String::new();
        let earlier = if let Some(bytes) = self.model.vocabulary().text_bytes(id) {
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
        let Passed { text, stopped } = self.stops.push(&text);
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
        let Passed { mut text, stopped } = self.stops.push(&last);
        if !stopped {
            text.push_str(&self.stops.finish());
        }
        text
    }
}
