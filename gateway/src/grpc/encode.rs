//! Events and models as `herd.v1` messages.

use herd_proto::v1 as wire;

use crate::event::{
    Delta, EventKind, FinishReason, Finished, GenerationEvent, Prompt, TokenDetail, TokenLogprob,
};
use crate::fleet::ListedModel;

/// What every event of a request shares.
pub(crate) struct About {
    pub(crate) seed: u64,
    pub(crate) model_digest: String,
    pub(crate) prompt_tokens: u32,
}

pub(crate) fn event(event: GenerationEvent, about: &About) -> wire::GenerateEvent {
    let GenerationEvent { choice, kind } = event;
    let (position, event) = match kind {
        EventKind::Started => {
            let started = wire::Started { seed: about.seed, model_digest: about.model_digest.clone() };
            (0, wire::generate_event::Event::Started(started))
        }
        EventKind::Prompt(Prompt { position, tokens }) => {
            let tokens = tokens.into_iter().map(detail).collect();
            (position, wire::generate_event::Event::Prompt(wire::PromptLogprobs { tokens }))
        }
        EventKind::Delta(Delta { position, token_ids, text, logprobs }) => {
            let logprobs = logprobs.into_iter().map(detail).collect();
            (position, wire::generate_event::Event::Delta(wire::Delta { token_ids, text, logprobs }))
        }
        EventKind::Finished(finished) => {
            let Finished { reason, completion_tokens, cached_tokens, logprob_sum: _, discarded_tokens } =
                finished;
            let reason = match reason {
                FinishReason::Stop => wire::finished::Reason::Stop,
                FinishReason::Length => wire::finished::Reason::Length,
            };
            let prompt_tokens = about.prompt_tokens;
            let usage =
                Some(wire::Usage { prompt_tokens, cached_tokens, completion_tokens, discarded_tokens });
            let finished = wire::Finished { reason: reason.into(), usage };
            (completion_tokens, wire::generate_event::Event::Finished(finished))
        }
    };
    wire::GenerateEvent { choice, position, event: Some(event) }
}

fn detail(detail: TokenDetail) -> wire::TokenLogprob {
    let TokenDetail { token, top, text_offset: _ } = detail;
    wire::TokenLogprob { top: top.into_iter().map(logprob).collect(), ..logprob(token) }
}

fn logprob(token: TokenLogprob) -> wire::TokenLogprob {
    let TokenLogprob { id, text, bytes, logprob } = token;
    wire::TokenLogprob { token_id: id, token: text, bytes: bytes.into(), logprob, top: Vec::new() }
}

pub(crate) fn model(model: ListedModel) -> wire::Model {
    let ListedModel { name, digest, context_length, ready_gangs } = model;
    wire::Model { name, context_length, digest, ready_gangs }
}
