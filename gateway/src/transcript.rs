//! From a choice's token ids to token-aligned text.

use std::collections::VecDeque;
use std::sync::Arc;

use herd_proto::internal::v1::{Token, TopLogprob};
use herd_text::{OutputStream, TextError, TextModel};

use crate::event::{Delta, TokenDetail, TokenLogprob};

/// Collects one choice's tokens and lets go of them together with the text they complete.
pub(crate) struct Transcript {
    text: Arc<TextModel>,
    output: OutputStream,
    /// The text as it would be without stop strings, for offsets; only where log probabilities are asked for.
    offsets: Option<OutputStream>,
    held: VecDeque<Held>,
    /// Tokens let go of.
    sent: u32,
}

struct Held {
    id: u32,
    detail: Option<TokenDetail>,
}

impl Transcript {
    pub(crate) fn new(text: &Arc<TextModel>, stop: Vec<String>, logprobs: bool) -> Result<Self, TextError> {
        let offsets = if logprobs { Some(OutputStream::new(text, Vec::new())?) } else { None };
        let output = OutputStream::new(text, stop)?;
        Ok(Self { text: Arc::clone(text), output, offsets, held: VecDeque::new(), sent: 0 })
    }

    /// Takes one token, adds what it completes to `delta`, and says whether a stop string ended the text: then what is
    /// still held is of the stop string alone.
    pub(crate) fn push(&mut self, token: Token, delta: &mut Delta) -> bool {
        let Token { id, logprob, top } = token;
        let detail = self.offsets.as_mut().map(|plain| {
            plain.push(id);
            TokenDetail {
                token: named(&self.text, id, logprob),
                top: top.iter().map(|&TopLogprob { id, logprob }| named(&self.text, id, logprob)).collect(),
                text_offset: plain.token_begin(),
            }
        });
        self.held.push_back(Held { id, detail });
        let piece = self.output.push(id);
        delta.text.push_str(&piece.text);
        self.release(piece.tokens, delta);
        piece.stopped
    }

    /// No more tokens will come: all that is held goes out.
    pub(crate) fn finish(&mut self, delta: &mut Delta) {
        delta.text.push_str(&self.output.finish());
        self.release(self.held.len(), delta);
    }

    fn release(&mut self, tokens: usize, delta: &mut Delta) {
        if delta.token_ids.is_empty() {
            delta.position = self.sent;
        }
        for Held { id, detail } in self.held.drain(..tokens.min(self.held.len())) {
            delta.token_ids.push(id);
            delta.logprobs.extend(detail);
            self.sent += 1;
        }
    }
}

fn named(text: &TextModel, id: u32, logprob: f32) -> TokenLogprob {
    let (text, bytes) = text.token_text(id);
    TokenLogprob { id, text, bytes, logprob }
}
