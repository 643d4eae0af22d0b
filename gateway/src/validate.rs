//! From a request as it came to one that can be run: the only place where a [`ValidatedGeneration`] is made.

use std::time::SystemTime;

use herd_proto::internal::v1 as wire;
use herd_text::{OutputStream, Stops, TextError};
use prost::Message as _;
use tokio::time::Instant;

use crate::fleet::Model;
use crate::request::{FieldNames, GenerationRequest, GrammarRequest, Input, SamplingRequest, ShapingRequest};
use crate::{Limits, RequestError};

/// Alternatives a token, at most.
pub const MAX_LOGPROBS: u32 = 20;

/// Stop tokens of a request, at most.
const MAX_STOP_TOKENS: usize = 128;

/// Bytes of a grammar, at most: as many as gangs compile.
const MAX_GRAMMAR_BYTES: usize = 128 << 10;

/// Tokens whose logits a request changes, at most.
const MAX_LOGIT_BIAS: usize = 1024;

/// A request that the model can answer.
pub(crate) struct ValidatedGeneration {
    pub(crate) model: Model,
    pub(crate) prompts: Vec<ValidatedPrompt>,
    /// Choices of a prompt that are wanted, and that are computed: no fewer.
    pub(crate) n: u32,
    pub(crate) best_of: u32,
    pub(crate) sampling: ValidatedSampling,
    pub(crate) request_id: String,
    pub(crate) deadline: Instant,
}

/// A prompt that fits the context.
pub(crate) struct ValidatedPrompt {
    pub(crate) tokens: Vec<u32>,
    /// At least 1; prompt and this fit the context.
    pub(crate) max_tokens: u32,
}

pub(crate) struct ValidatedSampling {
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) seed: u64,
    pub(crate) stops: Stops,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) shaping: wire::Shaping,
    pub(crate) grammar: Option<GrammarRequest>,
}

impl ValidatedGeneration {
    /// Choices computed over all prompts; choice `c` is of prompt `c / best_of`.
    pub(crate) fn choices(&self) -> u32 {
        self.prompts.len() as u32 * self.best_of
    }
}

/// Checks everything and tokenizes. Runs for as long as tokenizing takes: not for a reactor thread. `now` is for chat
/// templates that state the date; `drawn_seed` serves a request without a seed.
pub(crate) fn validate(
    request: GenerationRequest,
    model: Model,
    limits: &Limits,
    now: SystemTime,
    drawn_seed: u64,
) -> Result<ValidatedGeneration, RequestError> {
    let GenerationRequest { model: _, inputs, n, best_of, sampling, request_id, deadline, names } = request;
    let SamplingRequest {
        max_tokens,
        temperature,
        top_p,
        seed,
        stop,
        stop_token_ids,
        include_stop,
        logprobs,
        prompt_logprobs,
        ignore_eos,
        shaping,
        grammar,
    } = sampling;
    let (field, computed) = best_of.map_or((names.n, n), |best_of| ("best_of", best_of));
    if computed < n {
        let message = format!("best_of is {computed}, fewer than the {n} choices that {} asks for", names.n);
        return Err(RequestError::invalid(field, message));
    }
    let choices = (inputs.len() as u64) * u64::from(computed);
    if n == 0 || choices > limits.choices as u64 {
        let field = if n == 0 { names.n } else { field };
        let message = format!(
            "{field} must be at least 1 and give at most {} choices over all prompts; it gives {choices}",
            limits.choices
        );
        return Err(RequestError::invalid(field, message));
    }
    let temperature = in_range(names.temperature, temperature.unwrap_or(1.0), 0.0, 2.0)?;
    let top_p = in_range(names.top_p, top_p.unwrap_or(1.0), 0.0, 1.0)?;
    if top_p <= 0.0 {
        return Err(RequestError::invalid(names.top_p, format!("{} must be above 0", names.top_p)));
    }
    if let Some(logprobs) = logprobs.filter(|&logprobs| logprobs > MAX_LOGPROBS) {
        let message = format!("{} must be at most {MAX_LOGPROBS}, not {logprobs}", names.logprobs);
        return Err(RequestError::invalid(names.logprobs, message));
    }
    if let Some(top) = prompt_logprobs.filter(|&top| top > MAX_LOGPROBS) {
        let field = format!("{}prompt_logprobs", names.sampling);
        return Err(RequestError::invalid(
            &field,
            format!("{field} must be at most {MAX_LOGPROBS}, not {top}"),
        ));
    }
    if max_tokens == Some(0) {
        let message = format!("{} must be at least 1", names.max_tokens);
        return Err(RequestError::invalid(names.max_tokens, message));
    }
    let shaping = check_shaping(shaping, names.sampling, max_tokens, model.text.vocab_size())?;
    check_grammar(grammar.as_ref())?;
    let min_tokens = shaping.min_tokens as usize;
    let stops = Stops { strings: stop, included: include_stop, min_tokens };
    OutputStream::new(&model.text, stops.clone()).map_err(|error| text_error(&names, &error))?;
    let prompts = inputs
        .into_iter()
        .map(|input| {
            let tokens = tokenize(&model, input, &names, now)?;
            let max_tokens = fit(tokens.len() as u64, max_tokens, &model, &names)?;
            Ok(ValidatedPrompt { tokens, max_tokens })
        })
        .collect::<Result<Vec<_>, RequestError>>()?;
    let mut stop_ids = if ignore_eos { Vec::new() } else { model.text.stop_ids().to_vec() };
    stop_ids.extend(check_stop_tokens(stop_token_ids, names.sampling, model.text.vocab_size())?);
    let seed = seed.unwrap_or(drawn_seed);
    let sampling = ValidatedSampling {
        temperature,
        top_p,
        seed,
        stops,
        stop_ids,
        logprobs,
        prompt_logprobs,
        shaping,
        grammar,
    };
    Ok(ValidatedGeneration { model, prompts, n, best_of: computed, sampling, request_id, deadline })
}

/// `prefix` stands before the name of the field.
fn check_stop_tokens(ids: Vec<u32>, prefix: &str, vocab_size: usize) -> Result<Vec<u32>, RequestError> {
    let field = format!("{prefix}stop_token_ids");
    if ids.len() > MAX_STOP_TOKENS {
        let message = format!("{field} has {} tokens, at most {MAX_STOP_TOKENS} are allowed", ids.len());
        return Err(RequestError::invalid(field, message));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
        let message = format!("{field}: token {id} is not in the vocabulary of {vocab_size} tokens");
        return Err(RequestError::invalid(field, message));
    }
    Ok(ids)
}

/// Of a grammar only its size: a gang compiles it, and says what is wrong with it.
fn check_grammar(grammar: Option<&GrammarRequest>) -> Result<(), RequestError> {
    let Some(GrammarRequest { field, grammar }) = grammar else { return Ok(()) };
    let bytes = grammar.encoded_len();
    if bytes <= MAX_GRAMMAR_BYTES {
        return Ok(());
    }
    let message = format!("{field} has {bytes} bytes; at most {MAX_GRAMMAR_BYTES} are compiled");
    Err(RequestError::invalid(field, message))
}

/// `prefix` stands before the names of the fields.
fn check_shaping(
    shaping: ShapingRequest,
    prefix: &str,
    max_tokens: Option<u64>,
    vocab_size: usize,
) -> Result<wire::Shaping, RequestError> {
    let ShapingRequest {
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        min_tokens,
    } = shaping;
    let name = |field: &str| format!("{prefix}{field}");
    let repetition = name("repetition_penalty");
    if let Some(penalty) = repetition_penalty.filter(|penalty| !(penalty.is_finite() && *penalty > 0.0)) {
        let message = format!("{repetition} must be a number above 0, not {penalty}");
        return Err(RequestError::invalid(repetition, message));
    }
    let bias = name("logit_bias");
    if logit_bias.len() > MAX_LOGIT_BIAS {
        let message = format!("{bias} has {} tokens, at most {MAX_LOGIT_BIAS} are allowed", logit_bias.len());
        return Err(RequestError::invalid(bias, message));
    }
    if let Some((id, _)) = logit_bias.iter().find(|(id, _)| *id as usize >= vocab_size) {
        let message = format!("{bias}: token {id} is not in the vocabulary of {vocab_size} tokens");
        return Err(RequestError::invalid(bias, message));
    }
    for (_, value) in &logit_bias {
        in_range(&bias, *value, -100.0, 100.0)?;
    }
    if let Some(most) = max_tokens.filter(|most| min_tokens > *most) {
        let field = name("min_tokens");
        let message = format!("{field} is {min_tokens}, more than the {most} tokens that there may be");
        return Err(RequestError::invalid(field, message));
    }
    Ok(wire::Shaping {
        bias: logit_bias.into_iter().map(|(id, bias)| wire::TokenBias { id, bias }).collect(),
        min_tokens: u32::try_from(min_tokens).unwrap_or(u32::MAX),
        repetition_penalty,
        presence_penalty: in_range(&name("presence_penalty"), presence_penalty, -2.0, 2.0)?,
        frequency_penalty: in_range(&name("frequency_penalty"), frequency_penalty, -2.0, 2.0)?,
        top_k: u32::try_from(top_k).unwrap_or(u32::MAX),
        min_p: in_range(&name("min_p"), min_p, 0.0, 1.0)?,
    })
}

fn in_range(field: &str, value: f32, low: f32, high: f32) -> Result<f32, RequestError> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(RequestError::invalid(field, format!("{field} must be between {low} and {high}, not {value}")))
}

/// Refuses text that cannot fit whatever its tokens are, without tokenizing it: that takes seconds a megabyte.
fn bound_text(model: &Model, input: &Input, names: &FieldNames) -> Result<(), RequestError> {
    let (field, bytes) = match input {
        Input::Text(text) => (names.input, text.len()),
        Input::Chat(messages) => {
            (names.messages, messages.iter().map(|message| message.content.len()).sum::<usize>())
        }
        Input::Tokens(_) => return Ok(()),
    };
    let most = (model.context_length as usize).saturating_mul(model.text.longest_token());
    if bytes <= most {
        return Ok(());
    }
    let message = format!(
        "{field} has {bytes} bytes of text; model {:?} holds {} tokens, which are at most {most} bytes",
        model.name, model.context_length
    );
    Err(RequestError::invalid(field, message))
}

fn tokenize(
    model: &Model,
    input: Input,
    names: &FieldNames,
    now: SystemTime,
) -> Result<Vec<u32>, RequestError> {
    let text = &model.text;
    bound_text(model, &input, names)?;
    let tokens = match input {
        Input::Text(prompt) => text.encode(&prompt, true).map_err(|error| text_error(names, &error))?,
        Input::Chat(messages) => {
            text.render_chat(&messages, now).map_err(|error| text_error(names, &error))?
        }
        Input::Tokens(tokens) => {
            if let Some(id) = tokens.iter().find(|&&id| id as usize >= text.vocab_size()) {
                let message = format!("token {id} is not in the vocabulary of {} tokens", text.vocab_size());
                return Err(RequestError::invalid(names.input, message));
            }
            tokens
        }
    };
    if tokens.is_empty() {
        return Err(RequestError::invalid(names.input, format!("{} has no tokens", names.input)));
    }
    Ok(tokens)
}

/// The bound on generated tokens, given or as many as the context still holds.
fn fit(prompt: u64, asked: Option<u64>, model: &Model, names: &FieldNames) -> Result<u32, RequestError> {
    let context = u64::from(model.context_length);
    if prompt >= context {
        let message = format!(
            "{} has {prompt} tokens; model {:?} holds {context}, prompt and answer together",
            names.input, model.name
        );
        return Err(RequestError::invalid(names.input, message));
    }
    let room = context - prompt;
    match asked {
        Some(asked) if asked > room => {
            let message = format!(
                "{} is {asked}, but model {:?} holds {context} tokens and the prompt has {prompt}: at most {room}",
                names.max_tokens, model.name
            );
            Err(RequestError::invalid(names.max_tokens, message))
        }
        asked => Ok(asked.unwrap_or(room) as u32),
    }
}

/// A text error in this front door's words; where no field is at fault the model's own files are.
fn text_error(names: &FieldNames, error: &TextError) -> RequestError {
    let Some(field) = error.field() else { return RequestError::Failed(error.to_string()) };
    let field = match field.as_str() {
        "stop" => names.stop.to_owned(),
        "prompt" => names.input.to_owned(),
        other => other.replacen("messages", names.messages, 1),
    };
    RequestError::Invalid { field, message: error.to_string() }
}
