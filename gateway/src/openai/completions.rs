//! `POST /v1/completions`.

use std::borrow::Cow;

use serde::{Serialize, Serializer};
use serde_json::Value;
use tokio::time::Instant;

use super::answer::{About, Method, finish_reason};
use super::fields::{token_ids, wrong};
use super::prompt::{Echo, PromptLogprobs};
use super::request::{Own, Parsed, parse};
use super::usage::{Usage, UsageField};
use crate::RequestError;
use crate::event::{Delta, FinishReason, TokenDetail, TokenLogprob};
use crate::request::{FieldNames, Input};

const NAMES: FieldNames = FieldNames {
    model: "model",
    input: "prompt",
    messages: "prompt",
    max_tokens: "max_tokens",
    temperature: "temperature",
    top_p: "top_p",
    stop: "stop",
    logprobs: "logprobs",
    n: "n",
    sampling: "",
};

/// Reads a completion request.
pub(crate) fn read(body: &[u8], request_id: String, deadline: Instant) -> Result<Parsed, RequestError> {
    parse(body, request_id, deadline, |fields| {
        let inputs = prompts(fields.take("prompt"))?;
        let max_tokens = fields.count("max_tokens")?;
        let logprobs = fields.count("logprobs")?.map(|top| u32::try_from(top).unwrap_or(u32::MAX));
        let echo = fields.bool("echo")?;
        let best_of = fields.count("best_of")?.map(|best_of| u32::try_from(best_of).unwrap_or(u32::MAX));
        Ok(Own { inputs, max_tokens, logprobs, echo, best_of, names: NAMES })
    })
}

/// A text, a list of texts, a list of token ids, or a list of lists of them.
fn prompts(value: Option<Value>) -> Result<Vec<Input>, RequestError> {
    let expected = "a string, a list of strings, a list of token ids, or a list of lists of token ids";
    let value = match value {
        None => {
            return Err(RequestError::invalid("prompt", format!("prompt is missing: it must be {expected}")));
        }
        Some(Value::String(text)) => return Ok(vec![Input::Text(text)]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong("prompt", expected, &other)),
    };
    match value.first() {
        None => Err(RequestError::invalid("prompt", "prompt is an empty list")),
        Some(Value::Number(_)) => Ok(vec![Input::Tokens(token_ids("prompt", value)?)]),
        Some(_) => value
            .into_iter()
            .enumerate()
            .map(|(index, item)| match item {
                Value::String(text) => Ok(Input::Text(text)),
                Value::Array(ids) => Ok(Input::Tokens(token_ids(&format!("prompt[{index}]"), ids)?)),
                other => Err(wrong(&format!("prompt[{index}]"), "a string or a list of token ids", &other)),
            })
            .collect(),
    }
}

/// The answers of this method.
pub(crate) struct Completions;

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "UsageField::is_absent")]
    usage: UsageField,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: Cow<'a, str>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
}

#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "OpenAI's names")]
struct Logprobs {
    tokens: Vec<String>,
    /// The first token of a prompt has none.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Top>>,
    text_offset: Vec<usize>,
}

impl Logprobs {
    fn new(details: &[TokenDetail]) -> Self {
        Self {
            tokens: details.iter().map(|detail| name(&detail.token)).collect(),
            token_logprobs: details.iter().map(|detail| Some(detail.token.logprob)).collect(),
            top_logprobs: details.iter().map(|detail| Some(top(detail, usize::MAX))).collect(),
            text_offset: details.iter().map(|detail| detail.text_offset).collect(),
        }
    }

    /// Of a prompt that is echoed, and of what comes after it; `details` are of all its tokens but the first.
    fn with_prompt(self, echo: &Echo, details: &[TokenDetail], most: usize) -> Self {
        let mut with = Self {
            tokens: echo.names.clone(),
            token_logprobs: vec![None],
            top_logprobs: vec![None],
            text_offset: echo.offsets.clone(),
        };
        with.token_logprobs.extend(details.iter().map(|detail| Some(detail.token.logprob)));
        with.top_logprobs.extend(details.iter().map(|detail| Some(top(detail, most))));
        let Self { tokens, token_logprobs, top_logprobs, text_offset } = self;
        with.tokens.extend(tokens);
        with.token_logprobs.extend(token_logprobs);
        with.top_logprobs.extend(top_logprobs);
        with.text_offset.extend(text_offset.into_iter().map(|offset| echo.characters + offset));
        with
    }
}

/// Log probabilities by name. Not a [`Value`], which would print an `f32` with the digits of an `f64`.
struct Top(Vec<(String, f32)>);

impl Serialize for Top {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

/// `most` alternatives, and the token itself where it is not one of them: so up to one more than asked for.
fn top(detail: &TokenDetail, most: usize) -> Top {
    let mut top: Vec<(String, f32)> = Vec::new();
    for token in detail.top.iter().take(most).chain([&detail.token]) {
        let name = name(token);
        // Of tokens with the same bytes the likeliest stays.
        if top.iter().all(|(other, _)| *other != name) {
            top.push((name, token.logprob));
        }
    }
    Top(top)
}

/// A token's text, or `bytes:\xe2\x80` where it is not text alone: then two tokens never share a name.
fn name(token: &TokenLogprob) -> String {
    name_of(&token.text, &token.bytes)
}

pub(super) fn name_of(text: &str, bytes: &[u8]) -> String {
    if std::str::from_utf8(bytes).is_ok() {
        return text.to_owned();
    }
    bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
}

impl Completions {
    fn body(about: &About, choices: Vec<Choice<'_>>, usage: UsageField) -> Vec<u8> {
        let body = Body {
            id: &about.id,
            object: "text_completion",
            created: about.created,
            model: &about.model,
            choices,
            usage,
        };
        super::encode(&body)
    }

    fn prompt(about: &About, choice: u32) -> Option<&[u32]> {
        let prompt = about.prompts.get((choice / about.n) as usize);
        prompt.map(Vec::as_slice).filter(|_| about.delivery.token_ids)
    }
}

impl Method for Completions {
    const PREFIX: &'static str = "cmpl-";

    fn first(_about: &About, _choice: u32, _usage: UsageField) -> Option<Vec<u8>> {
        None
    }

    fn delta(about: &About, choice: u32, delta: &Delta, usage: UsageField) -> Vec<u8> {
        let Delta { position, token_ids, text, logprobs } = delta;
        let choice = Choice {
            index: choice,
            text: text.into(),
            logprobs: about.logprobs.map(|_| Logprobs::new(logprobs)),
            finish_reason: None,
            token_ids: about.delivery.token_ids.then_some(token_ids),
            prompt_token_ids: Self::prompt(about, choice).filter(|_| *position == 0),
            prompt_logprobs: None,
        };
        Self::body(about, vec![choice], usage)
    }

    fn last(about: &About, choice: u32, reason: FinishReason, usage: UsageField) -> Vec<u8> {
        let choice = Choice {
            index: choice,
            text: "".into(),
            logprobs: None,
            finish_reason: Some(finish_reason(reason)),
            token_ids: about.delivery.token_ids.then_some(&[][..]),
            prompt_token_ids: None,
            prompt_logprobs: None,
        };
        Self::body(about, vec![choice], usage)
    }

    fn usage(about: &About, usage: Usage) -> Vec<u8> {
        Self::body(about, Vec::new(), UsageField::Counts(usage))
    }

    fn whole(about: &About, choices: &[(Delta, FinishReason)], usage: Usage) -> Vec<u8> {
        let echoes = Echo::of(about);
        let choices = choices.iter().enumerate().map(|(index, (delta, reason))| {
            let prompt = index / about.n as usize;
            let echo = echoes.get(prompt);
            let logprobs = about.logprobs.map(|most| {
                let said = Logprobs::new(&delta.logprobs);
                let details = about.prompt_details.get(prompt).map_or(&[][..], Vec::as_slice);
                match echo {
                    Some(echo) => said.with_prompt(echo, details, most as usize),
                    None => said,
                }
            });
            Choice {
                index: index as u32,
                text: echo.map_or((&delta.text).into(), |echo| format!("{}{}", echo.text, delta.text).into()),
                logprobs,
                finish_reason: Some(finish_reason(*reason)),
                token_ids: about.delivery.token_ids.then_some(&delta.token_ids),
                prompt_token_ids: Self::prompt(about, index as u32),
                prompt_logprobs: PromptLogprobs::of(about, prompt),
            }
        });
        let choices = choices.collect();
        Self::body(about, choices, UsageField::Counts(usage))
    }
}
