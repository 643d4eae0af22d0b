//! From wire requests to engine requests, and back to wire events.

use std::sync::Arc;

use herd_engine::{Engine, FinishReason, Penalties, SampledToken, Shaping, SubmitError, TokenLogprob};
use herd_grammar::Grammar;
use herd_proto::internal::v1 as wire;
use tonic::Status;

use crate::grammars::{Grammars, grammar_from, grammar_to};
use crate::refusal::refuse;

/// More alternatives a token than any client asks for; each costs 8 bytes a token.
const MAX_TOP_LOGPROBS: u32 = 128;

/// More than any tokenizer has special tokens that end a text; compared with every token.
const MAX_STOP_IDS: usize = 1024;

/// Tokens whose logits a request changes.
const MAX_BIAS: usize = 1024;

/// A request this gang can run.
#[derive(Clone, Debug)]
pub(crate) struct ValidatedRequest {
    pub(crate) context: wire::Context,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: herd_engine::Sampling,
    /// What [`ValidatedRequest::constrain`] makes the constraint of the sampling from.
    pub(crate) grammar: Option<Grammar>,
}

/// What a gang is to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Keep the KV of the prompt and of all that is generated.
    Whole,
    /// Keep the prompt's.
    PromptOnly,
}

impl ValidatedRequest {
    /// Checks everything that would make the engine refuse it, its queue apart.
    pub(crate) fn new(
        engine: &Engine,
        context: Option<wire::Context>,
        prompt: Vec<u32>,
        sampling: Option<wire::Sampling>,
        work: Work,
    ) -> Result<Self, Status> {
        let context = context.unwrap_or_default();
        let sampling = sampling.ok_or_else(|| Status::invalid_argument("sampling: is missing"))?;
        let (sampling, grammar) = sampling_from(sampling, context.choice)?;
        if prompt.is_empty() {
            return Err(Status::invalid_argument("prompt: is empty"));
        }
        let vocab_size = engine.vocab_size();
        if let Some((at, id)) = prompt.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
            let message =
                format!("prompt[{at}]: token id {id} is not below the vocabulary size, {vocab_size}");
            return Err(Status::invalid_argument(message));
        }
        let generated = match work {
            Work::Whole => sampling.max_tokens,
            Work::PromptOnly => 0,
        };
        engine
            .limits()
            .positions(prompt.len(), generated)
            .map_err(|error| refuse(&SubmitError::TooLong(error)))?;
        Ok(Self { context, prompt, sampling, grammar })
    }

    /// Compiles its grammar, if it has one, and replays the tokens that the choice has. With true the text is whole: there is
    /// nothing to generate.
    pub(crate) async fn constrain(&mut self, grammars: &Arc<Grammars>) -> Result<bool, Status> {
        let Some(grammar) = self.grammar.clone() else { return Ok(false) };
        let said = self.prompt.len().saturating_sub(self.sampling.first_position);
        let constraint = grammars.constraint(grammar, self.prompt[said..].to_vec()).await?;
        let complete = constraint.is_complete();
        self.sampling.constraint = Some(constraint);
        Ok(complete)
    }
}

fn sampling_from(
    sampling: wire::Sampling,
    choice: u32,
) -> Result<(herd_engine::Sampling, Option<Grammar>), Status> {
    let wire::Sampling {
        max_tokens,
        temperature,
        top_p,
        seed,
        stop_token_ids,
        top_logprobs,
        first_position,
        shaping,
        grammar,
        prompt_logprobs,
    } = sampling;
    let bad =
        |field: &str, problem: String| Err(Status::invalid_argument(format!("sampling.{field}: {problem}")));
    if max_tokens == 0 {
        return bad("max_tokens", "0 is not at least 1".to_owned());
    }
    if !(temperature.is_finite() && temperature >= 0.0) {
        return bad("temperature", format!("{temperature} is not a number of at least 0"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return bad("top_p", format!("{top_p} is not above 0 and at most 1"));
    }
    if stop_token_ids.len() > MAX_STOP_IDS {
        return bad("stop_token_ids", format!("{} are more than {MAX_STOP_IDS}", stop_token_ids.len()));
    }
    let top_logprobs = top_logprobs.unwrap_or(0);
    if top_logprobs > MAX_TOP_LOGPROBS {
        return bad("top_logprobs", format!("{top_logprobs} is not at most {MAX_TOP_LOGPROBS}"));
    }
    if let Some(top) = prompt_logprobs.filter(|top| *top > MAX_TOP_LOGPROBS) {
        return bad("prompt_logprobs", format!("{top} is not at most {MAX_TOP_LOGPROBS}"));
    }
    let shaping = shaping_from(shaping.unwrap_or_default());
    if shaping.bias.len() > MAX_BIAS {
        return bad("shaping.bias", format!("{} are more than {MAX_BIAS}", shaping.bias.len()));
    }
    let grammar = grammar.map(grammar_from).transpose()?;
    let sampling = herd_engine::Sampling {
        max_tokens: max_tokens as usize,
        temperature,
        top_p,
        seed,
        choice,
        stop_ids: stop_token_ids,
        top_logprobs: top_logprobs as usize,
        first_position: first_position as usize,
        shaping,
        constraint: None,
        prompt_logprobs: prompt_logprobs.map(|top| top as usize),
    };
    Ok((sampling, grammar))
}

/// The engine checks the numbers.
fn shaping_from(shaping: wire::Shaping) -> Shaping {
    let wire::Shaping {
        bias,
        min_tokens,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        top_k,
        min_p,
    } = shaping;
    Shaping {
        bias: bias.into_iter().map(|wire::TokenBias { id, bias }| (id, bias)).collect(),
        min_tokens: min_tokens as usize,
        penalties: Penalties {
            repetition: repetition_penalty.unwrap_or(1.0),
            presence: presence_penalty,
            frequency: frequency_penalty,
        },
        top_k: top_k as usize,
        min_p,
    }
}

fn shaping_to(shaping: &Shaping) -> wire::Shaping {
    let Shaping { bias, min_tokens, penalties, top_k, min_p } = shaping;
    let Penalties { repetition, presence, frequency } = *penalties;
    wire::Shaping {
        bias: bias.iter().map(|&(id, bias)| wire::TokenBias { id, bias }).collect(),
        min_tokens: *min_tokens as u32,
        repetition_penalty: Some(repetition),
        presence_penalty: presence,
        frequency_penalty: frequency,
        top_k: *top_k as u32,
        min_p: *min_p,
    }
}

/// As it was before [`sampling_from`].
pub(crate) fn sampling_to(sampling: &herd_engine::Sampling, grammar: Option<&Grammar>) -> wire::Sampling {
    let herd_engine::Sampling {
        max_tokens,
        temperature,
        top_p,
        seed,
        choice: _,
        stop_ids,
        top_logprobs,
        first_position,
        shaping,
        constraint: _,
        prompt_logprobs,
    } = sampling;
    wire::Sampling {
        max_tokens: *max_tokens as u32,
        temperature: *temperature,
        top_p: *top_p,
        seed: *seed,
        stop_token_ids: stop_ids.clone(),
        top_logprobs: Some(*top_logprobs as u32),
        first_position: *first_position as u32,
        shaping: Some(shaping_to(shaping)),
        grammar: grammar.map(grammar_to),
        prompt_logprobs: prompt_logprobs.map(|top| top as u32),
    }
}

/// Tokens of a prompt.
pub(crate) fn prompt_to(tokens: Vec<SampledToken>) -> wire::Tokens {
    let position = tokens.first().map_or(0, |token| token.position as u32);
    wire::Tokens { position, tokens: tokens.into_iter().map(token_to).collect() }
}

pub(crate) fn token_to(token: SampledToken) -> wire::Token {
    let SampledToken { position: _, token: TokenLogprob { id, logprob }, top } = token;
    let top = top.into_iter().map(|TokenLogprob { id, logprob }| wire::TopLogprob { id, logprob }).collect();
    wire::Token { id, logprob, top }
}

pub(crate) fn token_from(position: usize, token: wire::Token) -> SampledToken {
    let wire::Token { id, logprob, top } = token;
    let top = top.into_iter().map(|wire::TopLogprob { id, logprob }| TokenLogprob { id, logprob }).collect();
    SampledToken { position, token: TokenLogprob { id, logprob }, top }
}

pub(crate) fn finished_to(reason: FinishReason) -> wire::Finished {
    let reason = match reason {
        FinishReason::Stop => wire::finished::Reason::Stop,
        FinishReason::Length => wire::finished::Reason::Length,
    };
    wire::Finished { reason: reason.into(), cached_tokens: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> wire::Sampling {
        wire::Sampling {
            max_tokens: 3,
            temperature: 0.5,
            top_p: 0.9,
            seed: 1 << 40,
            stop_token_ids: vec![2, 3],
            top_logprobs: Some(4),
            first_position: 7,
            shaping: Some(wire::Shaping {
                bias: vec![wire::TokenBias { id: 4, bias: -1.5 }],
                min_tokens: 5,
                repetition_penalty: Some(1.1),
                presence_penalty: 0.5,
                frequency_penalty: 0.25,
                top_k: 40,
                min_p: 0.05,
            }),
            grammar: Some(wire::Grammar { kind: Some(wire::grammar::Kind::Regex("a|b".to_owned())) }),
            prompt_logprobs: Some(6),
        }
    }

    #[test]
    fn sampling_survives_both_ways() {
        let (read, grammar) = sampling_from(sampling(), 1).unwrap();
        assert_eq!(sampling_to(&read, grammar.as_ref()), sampling());
    }

    #[test]
    fn bad_sampling_names_the_field() {
        for (field, bad) in [
            ("max_tokens", wire::Sampling { max_tokens: 0, ..sampling() }),
            ("temperature", wire::Sampling { temperature: -1.0, ..sampling() }),
            ("temperature", wire::Sampling { temperature: f32::NAN, ..sampling() }),
            ("top_p", wire::Sampling { top_p: 0.0, ..sampling() }),
            ("top_p", wire::Sampling { top_p: f32::NAN, ..sampling() }),
            ("top_p", wire::Sampling { top_p: 1.1, ..sampling() }),
            ("stop_token_ids", wire::Sampling { stop_token_ids: vec![0; MAX_STOP_IDS + 1], ..sampling() }),
            ("top_logprobs", wire::Sampling { top_logprobs: Some(MAX_TOP_LOGPROBS + 1), ..sampling() }),
            ("prompt_logprobs", wire::Sampling { prompt_logprobs: Some(MAX_TOP_LOGPROBS + 1), ..sampling() }),
            ("grammar", wire::Sampling { grammar: Some(wire::Grammar { kind: None }), ..sampling() }),
            (
                "shaping.bias",
                wire::Sampling {
                    shaping: Some(wire::Shaping {
                        bias: vec![wire::TokenBias::default(); MAX_BIAS + 1],
                        ..wire::Shaping::default()
                    }),
                    ..sampling()
                },
            ),
        ] {
            let status = sampling_from(bad, 0).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with(&format!("sampling.{field}: ")), "{status:?}");
        }
    }
}
