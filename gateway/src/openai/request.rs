//! What the two OpenAI methods have in common in their requests.

use serde_json::Value;
use tokio::time::Instant;

use super::fields::{Fields, wrong};
use super::structured;
use crate::RequestError;
use crate::request::{FieldNames, GenerationRequest, Input, SamplingRequest, ShapingRequest};

/// Known to clients of OpenAI, `vLLM` and `SGLang`, not served here; each with the values that ask for nothing.
const UNSERVED: &[(&str, &[&str])] = &[
    ("tools", &["[]"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("functions", &["[]"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("modalities", &[r#"["text"]"#]),
    ("audio", &[]),
    ("prediction", &[]),
    ("web_search_options", &[]),
    ("reasoning_effort", &["\"none\""]),
    ("store", &["false"]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("guided_choice", &["[]"]),
    ("guided_grammar", &[]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &["{}"]),
    ("add_generation_prompt", &["true"]),
    ("continue_final_message", &["false"]),
    ("use_beam_search", &["false"]),
    ("prompt_embeds", &[]),
    ("echo", &["false"]),
    ("suffix", &["\"\""]),
    ("best_of", &["1"]),
    ("truncate_prompt_tokens", &[]),
    ("priority", &["0"]),
];

/// -1 is all, as `vLLM` has it.
fn top_k(value: Option<Value>) -> Result<u64, RequestError> {
    let Some(value) = value else { return Ok(0) };
    match value.as_i64() {
        Some(-1) => Ok(0),
        Some(top_k) if top_k >= 0 => Ok(top_k.cast_unsigned()),
        _ => Err(wrong("top_k", "a whole number of at least -1", &value)),
    }
}

/// Token ids as JSON has them for keys: strings.
fn logit_bias(value: Option<Value>) -> Result<Vec<(u32, f32)>, RequestError> {
    let entries = match value {
        None => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(wrong("logit_bias", "an object of token ids", &other)),
    };
    let entry = |(token, bias): (String, Value)| {
        let id = token.parse().map_err(|_| {
            RequestError::invalid("logit_bias", format!("logit_bias: {token:?} is no token id"))
        })?;
        let bias = bias.as_f64().ok_or_else(|| wrong("logit_bias", "of numbers", &bias))?;
        Ok((id, bias as f32))
    };
    entries.into_iter().map(entry).collect()
}

/// How the answer is to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the API")]
pub(crate) struct Delivery {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) token_ids: bool,
    /// The prompt is part of the text.
    pub(crate) echo: bool,
    /// How likely the prompt is.
    pub(crate) prompt_logprobs: bool,
}

/// A request read, with the fields nobody knows.
pub(crate) struct Parsed {
    pub(crate) request: GenerationRequest,
    pub(crate) delivery: Delivery,
    pub(crate) ignored: Vec<String>,
}

/// Fields nobody knows are named to the client, this many at most.
const MAX_IGNORED: usize = 16;
/// Characters of such a name that are repeated to the client, at most.
const MAX_IGNORED_NAME: usize = 64;

/// A name as a header can carry it: short, and of visible ASCII.
fn cut(name: &str) -> String {
    let visible = name.chars().map(|character| if character.is_ascii_graphic() { character } else { '?' });
    visible.take(MAX_IGNORED_NAME).collect()
}

/// What differs between the two methods.
pub(crate) struct Own {
    pub(crate) inputs: Vec<Input>,
    pub(crate) max_tokens: Option<u64>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) echo: bool,
    pub(crate) best_of: Option<u32>,
    pub(crate) names: FieldNames,
}

/// Reads what both methods share, once `own` has taken what is its own.
pub(crate) fn parse(
    body: &[u8],
    request_id: String,
    deadline: Instant,
    own: impl FnOnce(&mut Fields) -> Result<Own, RequestError>,
) -> Result<Parsed, RequestError> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model")?.unwrap_or_default();
    let Own { inputs, max_tokens, logprobs, echo, best_of, names } = own(&mut fields)?;
    let n = match fields.count("n")? {
        None => 1,
        Some(n) => u32::try_from(n).unwrap_or(u32::MAX),
    };
    let prompt_logprobs = fields.count("prompt_logprobs")?.map(|top| u32::try_from(top).unwrap_or(u32::MAX));
    let sampling = SamplingRequest {
        max_tokens,
        temperature: fields.number("temperature")?,
        top_p: fields.number("top_p")?,
        seed: fields.seed("seed")?,
        stop: fields.strings("stop")?,
        stop_token_ids: fields.token_ids("stop_token_ids")?,
        include_stop: fields.bool("include_stop_str_in_output")?,
        logprobs,
        // What is echoed comes with its log probabilities too.
        prompt_logprobs: prompt_logprobs.max(logprobs.filter(|_| echo)),
        ignore_eos: fields.bool("ignore_eos")?,
        shaping: ShapingRequest {
            top_k: top_k(fields.take("top_k"))?,
            min_p: fields.number("min_p")?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty")?,
            presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0),
            logit_bias: logit_bias(fields.take("logit_bias"))?,
            min_tokens: fields.count("min_tokens")?.unwrap_or(0),
        },
        grammar: structured::grammar(&mut fields)?,
    };
    let stream = fields.bool("stream")?;
    let token_ids = fields.bool("return_token_ids")?;
    let mut delivery = Delivery {
        stream,
        token_ids,
        echo,
        prompt_logprobs: prompt_logprobs.is_some(),
        ..Delivery::default()
    };
    let whole = [
        ("prompt_logprobs", prompt_logprobs.is_some()),
        ("echo", echo),
        ("best_of", best_of.is_some_and(|best_of| best_of != n)),
    ];
    if let Some((field, _)) = whole.iter().find(|(_, asked)| stream && *asked) {
        return Err(RequestError::invalid(*field, format!("{field} is not streamed; leave out stream")));
    }
    match fields.take("stream_options") {
        None => {}
        Some(_) if !stream => {
            let message = "stream_options is only allowed when stream is true";
            return Err(RequestError::invalid("stream_options", message));
        }
        Some(Value::Object(options)) => {
            let flag = |name: &str| match options.get(name) {
                None | Some(Value::Null) => Ok(false),
                Some(Value::Bool(value)) => Ok(*value),
                Some(other) => Err(wrong(&format!("stream_options.{name}"), "true or false", other)),
            };
            delivery.include_usage = flag("include_usage")?;
            delivery.continuous_usage = flag("continuous_usage_stats")?;
        }
        Some(other) => return Err(wrong("stream_options", "an object", &other)),
    }
    fields.refuse(UNSERVED)?;
    let ignored = fields.rest().take(MAX_IGNORED).map(cut).collect();
    let request = GenerationRequest { model, inputs, n, best_of, sampling, request_id, deadline, names };
    Ok(Parsed { request, delivery, ignored })
}
