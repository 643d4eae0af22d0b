//! Events as an OpenAI answer, streamed or whole; the two methods differ only in the bodies they encode.

use std::sync::Arc;

use herd_text::TextModel;

use super::request::Delivery;
use super::usage::{Usage, UsageField};
use crate::RequestError;
use crate::event::{Delta, EventKind, FinishReason, Finished, GenerationEvent, Prompt, TokenDetail};

/// What every body of an answer shares.
pub(crate) struct About {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) n: u32,
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Alternatives a token, where log probabilities are asked for.
    pub(crate) logprobs: Option<u32>,
    pub(crate) text: Arc<TextModel>,
    /// How likely the tokens of each prompt are, the first one apart; none where nobody asked.
    pub(crate) prompt_details: Vec<Vec<TokenDetail>>,
    pub(crate) delivery: Delivery,
}

/// The bodies of one method.
pub(crate) trait Method: Send + 'static {
    /// Of an answer's id.
    const PREFIX: &'static str;
    /// A choice begins; `None` where the method says nothing then.
    fn first(about: &About, choice: u32, usage: UsageField) -> Option<Vec<u8>>;
    fn delta(about: &About, choice: u32, delta: &Delta, usage: UsageField) -> Vec<u8>;
    fn last(about: &About, choice: u32, reason: FinishReason, usage: UsageField) -> Vec<u8>;
    /// The chunk without choices.
    fn usage(about: &About, usage: Usage) -> Vec<u8>;
    /// The answer in one piece, choices by index.
    fn whole(about: &About, choices: &[(Delta, FinishReason)], usage: Usage) -> Vec<u8>;
}

pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Counts tokens over a whole answer.
#[derive(Default)]
pub(crate) struct Tally {
    prompt: u32,
    cached: u32,
    completion: u32,
}

impl Tally {
    pub(crate) fn new(about: &About) -> Self {
        let prompt = about.prompts.iter().map(Vec::len).sum::<usize>() as u32;
        Self { prompt, cached: 0, completion: 0 }
    }

    fn finished(&mut self, finished: Finished) {
        let Finished { reason: _, completion_tokens, cached_tokens, logprob_sum: _, discarded_tokens } =
            finished;
        self.completion += completion_tokens + discarded_tokens;
        self.cached += cached_tokens;
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage::new(self.prompt, self.cached, self.completion)
    }
}

/// Encodes events one after another.
pub(crate) struct Chunks {
    pub(crate) about: About,
    tally: Tally,
    /// Tokens sent of each choice that has not finished: for usage that runs along.
    running: Vec<u32>,
}

impl Chunks {
    pub(crate) fn new(about: About) -> Self {
        let tally = Tally::new(&about);
        let running = vec![0; about.prompts.len() * about.n as usize];
        Self { about, tally, running }
    }

    /// The body for an event, if it has one.
    pub(crate) fn encode<M: Method>(&mut self, event: GenerationEvent) -> Option<Vec<u8>> {
        let GenerationEvent { choice, kind } = event;
        let running = self.running.get_mut(choice as usize)?;
        match kind {
            EventKind::Started => M::first(&self.about, choice, self.along()),
            // Whoever asks for it is answered in one piece.
            EventKind::Prompt(_) => None,
            EventKind::Delta(delta) => {
                *running += delta.token_ids.len() as u32;
                let says_something =
                    !delta.text.is_empty() || self.about.delivery.token_ids || !delta.logprobs.is_empty();
                says_something.then(|| M::delta(&self.about, choice, &delta, self.along()))
            }
            EventKind::Finished(finished) => {
                *running = 0;
                self.tally.finished(finished);
                Some(M::last(&self.about, choice, finished.reason, self.along()))
            }
        }
    }

    /// The last chunk, for who asked for it.
    pub(crate) fn usage<M: Method>(&self) -> Option<Vec<u8>> {
        self.about.delivery.include_usage.then(|| M::usage(&self.about, self.tally.usage()))
    }

    /// The usage field of a chunk with choices: absent, null, or the counts so far.
    fn along(&self) -> UsageField {
        let delivery = self.about.delivery;
        if delivery.include_usage && delivery.continuous_usage {
            let completion = self.tally.completion + self.running.iter().sum::<u32>();
            return UsageField::Counts(Usage::new(self.tally.prompt, self.tally.cached, completion));
        }
        if delivery.include_usage { UsageField::Null } else { UsageField::Absent }
    }
}

/// Collects an answer that is sent in one piece.
pub(crate) struct Whole {
    pub(crate) about: About,
    tally: Tally,
    choices: Vec<(Delta, Option<FinishReason>)>,
}

impl Whole {
    pub(crate) fn new(about: About) -> Self {
        let tally = Tally::new(&about);
        let choices = vec![(Delta::default(), None); about.prompts.len() * about.n as usize];
        Self { about, tally, choices }
    }

    pub(crate) fn take(&mut self, event: GenerationEvent) {
        let GenerationEvent { choice, kind } = event;
        let Some((whole, reason)) = self.choices.get_mut(choice as usize) else { return };
        match kind {
            EventKind::Started => {}
            EventKind::Prompt(Prompt { position: _, tokens }) => {
                self.about.prompt_details.resize(self.about.prompts.len(), Vec::new());
                if let Some(details) = self.about.prompt_details.get_mut((choice / self.about.n) as usize) {
                    details.extend(tokens);
                }
            }
            EventKind::Delta(Delta { position: _, token_ids, text, logprobs }) => {
                whole.token_ids.extend(token_ids);
                whole.text.push_str(&text);
                whole.logprobs.extend(logprobs);
            }
            EventKind::Finished(finished) => {
                *reason = Some(finished.reason);
                self.tally.finished(finished);
            }
        }
    }

    pub(crate) fn body<M: Method>(self) -> Result<Vec<u8>, RequestError> {
        let Self { about, tally, choices } = self;
        let finished: Option<Vec<_>> =
            choices.into_iter().map(|(delta, reason)| reason.map(|reason| (delta, reason))).collect();
        let choices = finished
            .ok_or_else(|| RequestError::Failed("the generation ended before its choices".to_owned()))?;
        Ok(M::whole(&about, &choices, tally.usage()))
    }
}
