//! `POST /v1/chat/completions`.

use herd_text::Message;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::answer::{About, Method, finish_reason};
use super::fields::{Fields, wrong};
use super::prompt::PromptLogprobs;
use super::request::{Own, Parsed, parse};
use super::usage::{Usage, UsageField};
use crate::RequestError;
use crate::event::{Delta, FinishReason, TokenDetail, TokenLogprob};
use crate::request::{FieldNames, Input};

const NAMES: FieldNames = FieldNames {
    model: "model",
    input: "messages",
    messages: "messages",
    max_tokens: "max_tokens",
    temperature: "temperature",
    top_p: "top_p",
    stop: "stop",
    logprobs: "top_logprobs",
    n: "n",
    sampling: "",
};

/// Reads a chat request.
pub(crate) fn read(body: &[u8], request_id: String, deadline: Instant) -> Result<Parsed, RequestError> {
    parse(body, request_id, deadline, |fields| {
        let messages = messages(fields.take("messages"))?;
        let old = fields.count("max_tokens")?;
        let new = fields.count("max_completion_tokens")?;
        let names = FieldNames {
            max_tokens: if new.is_some() { "max_completion_tokens" } else { "max_tokens" },
            ..NAMES
        };
        Ok(Own {
            inputs: vec![Input::Chat(messages)],
            max_tokens: new.or(old),
            logprobs: logprobs(fields)?,
            echo: false,
            best_of: None,
            names,
        })
    })
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, RequestError> {
    let wanted = fields.bool("logprobs")?;
    match fields.count("top_logprobs")? {
        None | Some(0) => Ok(wanted.then_some(0)),
        Some(top) if wanted => Ok(Some(u32::try_from(top).unwrap_or(u32::MAX))),
        Some(_) => Err(RequestError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

fn messages(value: Option<Value>) -> Result<Vec<Message>, RequestError> {
    match value {
        None => Err(RequestError::invalid("messages", "messages is missing: it must be a list of messages")),
        Some(Value::Array(messages)) => {
            messages.into_iter().enumerate().map(|(index, message)| one_message(index, message)).collect()
        }
        Some(other) => Err(wrong("messages", "a list of messages", &other)),
    }
}

fn one_message(index: usize, message: Value) -> Result<Message, RequestError> {
    let path = format!("messages[{index}]");
    let Value::Object(mut message) = message else { return Err(wrong(&path, "an object", &message)) };
    for unserved in ["tool_calls", "function_call", "tool_call_id", "audio"] {
        let value = message.get(unserved).unwrap_or(&Value::Null);
        if !(value.is_null() || *value == Value::Array(Vec::new())) {
            let field = format!("{path}.{unserved}");
            return Err(RequestError::invalid(
                &field,
                format!("{field} is not served by this gateway; leave it out"),
            ));
        }
    }
    let role = match message.swap_remove("role") {
        Some(Value::String(role)) => role,
        other => return Err(wrong(&format!("{path}.role"), "a string", &other.unwrap_or_default())),
    };
    let field = format!("{path}.content");
    let content = match message.swap_remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts
            .into_iter()
            .enumerate()
            .map(|(part, value)| text_part(&format!("{field}[{part}]"), &value))
            .collect::<Result<Vec<_>, _>>()?
            .join("\n"),
        other => return Err(wrong(&field, "a string or a list of text parts", &other.unwrap_or_default())),
    };
    Ok(Message { role, content })
}

fn text_part(path: &str, part: &Value) -> Result<String, RequestError> {
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
    if kind != "text" {
        let field = format!("{path}.type");
        return Err(RequestError::invalid(&field, format!("{field} is {kind:?}; only \"text\" is served")));
    }
    match part.get("text") {
        Some(Value::String(text)) => Ok(text.clone()),
        other => Err(wrong(&format!("{path}.text"), "a string", other.unwrap_or(&Value::Null))),
    }
}

/// The answers of this method.
pub(crate) struct Chat;

#[derive(Serialize)]
struct Body<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "UsageField::is_absent")]
    usage: UsageField,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: ChunkDelta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

#[derive(Default, Serialize)]
struct ChunkDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: u32,
    message: WholeMessage<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
struct WholeMessage<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<Entry>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Entry {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<TopEntry>,
}

#[derive(Serialize)]
struct TopEntry {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Logprobs {
    fn new(details: &[TokenDetail]) -> Self {
        let content =
            details
                .iter()
                .map(|TokenDetail { token, top, text_offset: _ }| {
                    let TokenLogprob { id: _, text, bytes, logprob } = token.clone();
                    let top = top.iter().cloned().map(|TokenLogprob { id: _, text, bytes, logprob }| {
                        TopEntry { token: text, logprob, bytes }
                    });
                    Entry { token: text, logprob, bytes, top_logprobs: top.collect() }
                })
                .collect();
        Self { content, refusal: None }
    }
}

impl Chat {
    fn chunk(about: &About, choice: ChunkChoice<'_>, usage: UsageField) -> Vec<u8> {
        Self::body(about, "chat.completion.chunk", vec![choice], usage, false)
    }

    fn body<C: Serialize>(
        about: &About,
        object: &'static str,
        choices: Vec<C>,
        usage: UsageField,
        with_prompt: bool,
    ) -> Vec<u8> {
        let prompt_token_ids = (with_prompt && about.delivery.token_ids)
            .then(|| about.prompts.first().map_or(&[][..], Vec::as_slice));
        let body = Body {
            id: &about.id,
            object,
            created: about.created,
            model: &about.model,
            choices,
            usage,
            prompt_token_ids,
            prompt_logprobs: PromptLogprobs::of(about, 0),
        };
        super::encode(&body)
    }
}

impl Method for Chat {
    const PREFIX: &'static str = "chatcmpl-";

    fn first(about: &About, choice: u32, usage: UsageField) -> Option<Vec<u8>> {
        let choice = ChunkChoice {
            index: choice,
            delta: ChunkDelta { role: Some("assistant"), content: Some("") },
            logprobs: None,
            finish_reason: None,
            token_ids: about.delivery.token_ids.then_some(&[][..]),
        };
        Some(Self::body(about, "chat.completion.chunk", vec![choice], usage, true))
    }

    fn delta(about: &About, choice: u32, delta: &Delta, usage: UsageField) -> Vec<u8> {
        let Delta { position: _, token_ids, text, logprobs } = delta;
        let choice = ChunkChoice {
            index: choice,
            delta: ChunkDelta { role: None, content: Some(text) },
            logprobs: about.logprobs.map(|_| Logprobs::new(logprobs)),
            finish_reason: None,
            token_ids: about.delivery.token_ids.then_some(token_ids),
        };
        Self::chunk(about, choice, usage)
    }

    fn last(about: &About, choice: u32, reason: FinishReason, usage: UsageField) -> Vec<u8> {
        let choice = ChunkChoice {
            index: choice,
            delta: ChunkDelta::default(),
            logprobs: None,
            finish_reason: Some(finish_reason(reason)),
            token_ids: about.delivery.token_ids.then_some(&[][..]),
        };
        Self::chunk(about, choice, usage)
    }

    fn usage(about: &About, usage: Usage) -> Vec<u8> {
        Self::body(
            about,
            "chat.completion.chunk",
            Vec::<ChunkChoice<'_>>::new(),
            UsageField::Counts(usage),
            false,
        )
    }

    fn whole(about: &About, choices: &[(Delta, FinishReason)], usage: Usage) -> Vec<u8> {
        let choices = choices
            .iter()
            .enumerate()
            .map(|(index, (delta, reason))| WholeChoice {
                index: index as u32,
                message: WholeMessage { role: "assistant", content: &delta.text, refusal: None },
                logprobs: about.logprobs.map(|_| Logprobs::new(&delta.logprobs)),
                finish_reason: finish_reason(*reason),
                token_ids: about.delivery.token_ids.then_some(&delta.token_ids),
            })
            .collect();
        Self::body(about, "chat.completion", choices, UsageField::Counts(usage), true)
    }
}
