//! From a choice's token ids to token-aligned text.

use std::collections::VecDeque;
use std::sync::Arc;

use herd_proto::internal::v1::{Token, TopLogprob};
use herd_text::{OutputStream, Stops, TextError, TextModel};

use crate::event::{Delta, TokenDetail, TokenLogprob};
use crate::validate::ValidatedSampling;

/// Collects one choice's tokens and lets go of them together with the text they complete.
pub(crate) struct Transcript {
    text: Arc<TextModel>,
    output: OutputStream,
    /// The text as it would be without stop strings, for offsets; only where log probabilities are asked for.
    offsets: Option<OutputStream>,
    held: VecDeque<Held>,
    /// Tokens let go of.
    sent: u32,
    /// Each ends the choice.
    stop_ids: Vec<u32>,
    /// Whether the text of a stop token is part of the output.
    include_stop: bool,
}

struct Held {
    id: u32,
    detail: Option<TokenDetail>,
}

impl Transcript {
    pub(crate) fn new(text: &Arc<TextModel>, sampling: &ValidatedSampling) -> Result<Self, TextError> {
        let stops = &sampling.stops;
        let offsets = match sampling.logprobs {
            Some(_) => Some(OutputStream::new(text, Stops::default())?),
            None => None,
        };
        let output = OutputStream::new(text, stops.clone())?;
        Ok(Self {
            text: Arc::clone(text),
            output,
            offsets,
            held: VecDeque::new(),
            sent: 0,
            stop_ids: sampling.stop_ids.clone(),
            include_stop: stops.included,
        })
    }

    /// Takes one token, adds what it completes to `delta`, and says whether a stop string ended the text: then what is
    /// still held is of the stop string alone.
    pub(crate) fn push(&mut self, token: &Token, delta: &mut Delta) -> bool {
        let id = token.id;
        let detail = self.offsets.as_mut().map(|plain| {
            plain.push(id);
            TokenDetail { text_offset: plain.token_begin(), ..detail(&self.text, token) }
        });
        self.held.push_back(Held { id, detail });
        let is_silent = !self.include_stop && self.stop_ids.contains(&id);
        let piece = if is_silent { self.output.push_stop(id) } else { self.output.push(id) };
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

/// A token with its log probability, apart from any text.
pub(crate) fn detail(text: &TextModel, token: &Token) -> TokenDetail {
    let Token { id, logprob, top } = token;
    TokenDetail {
        token: named(text, *id, *logprob),
        top: top.iter().map(|&TopLogprob { id, logprob }| named(text, id, logprob)).collect(),
        text_offset: 0,
    }
}

fn named(text: &TextModel, id: u32, logprob: f32) -> TokenLogprob {
    let (text, bytes) = text.token_text(id);
    TokenLogprob { id, text, bytes, logprob }
}
