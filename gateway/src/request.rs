//! What either front door asks for, before it is checked.

use herd_proto::internal::v1::Grammar;
use herd_text::Message;
use tokio::time::Instant;

/// One request as it came, in terms that both front doors share.
#[derive(Clone, Debug)]
pub(crate) struct GenerationRequest {
    /// A served name.
    pub(crate) model: String,
    /// Each is answered with `n` choices.
    pub(crate) inputs: Vec<Input>,
    /// Choices an input.
    pub(crate) n: u32,
    /// Absent: `n`. So many choices an input are computed, and the likeliest ones are the answer.
    pub(crate) best_of: Option<u32>,
    /// How to draw tokens and when to stop.
    pub(crate) sampling: SamplingRequest,
    /// Of the client, or made up; told to the gangs.
    pub(crate) request_id: String,
    /// When to give up.
    pub(crate) deadline: Instant,
    /// What this front door calls the fields, for errors.
    pub(crate) names: FieldNames,
}

/// What to go on from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// Tokenized as plain text.
    Text(String),
    /// Taken as they are.
    Tokens(Vec<u32>),
    /// Rendered through the model's chat template.
    Chat(Vec<Message>),
}

/// Absent values have defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SamplingRequest {
    /// Absent: as many as the context holds.
    pub(crate) max_tokens: Option<u64>,
    /// Absent: 1.
    pub(crate) temperature: Option<f32>,
    /// Absent: 1.
    pub(crate) top_p: Option<f32>,
    /// Absent: drawn.
    pub(crate) seed: Option<u64>,
    /// Each ends the text.
    pub(crate) stop: Vec<String>,
    /// Each ends the answer, beside the model's own.
    pub(crate) stop_token_ids: Vec<u32>,
    /// Whether what ended the text is part of it.
    pub(crate) include_stop: bool,
    /// Present: log probabilities, with this many alternatives.
    pub(crate) logprobs: Option<u32>,
    /// Present: log probabilities of the prompt's tokens, with this many alternatives.
    pub(crate) prompt_logprobs: Option<u32>,
    /// Go on past end-of-sequence tokens.
    pub(crate) ignore_eos: bool,
    /// What is done to the logits.
    pub(crate) shaping: ShapingRequest,
    /// What the answer has to match.
    pub(crate) grammar: Option<GrammarRequest>,
}

/// A grammar, and what this front door calls the field it came in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GrammarRequest {
    pub(crate) field: String,
    pub(crate) grammar: Grammar,
}

/// What is done to logits before a token is drawn; absent and 0 are nothing, unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ShapingRequest {
    /// The most likely tokens that are left.
    pub(crate) top_k: u64,
    /// Of the most likely one's probability, what a token that is left has at least.
    pub(crate) min_p: f32,
    /// Absent: 1.
    pub(crate) repetition_penalty: Option<f32>,
    /// Once a token of the answer.
    pub(crate) presence_penalty: f32,
    /// Each time it comes.
    pub(crate) frequency_penalty: f32,
    /// By token id.
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Without an end-of-sequence token, a stop token or a stop string.
    pub(crate) min_tokens: u64,
}

/// A front door's names for the fields that can be at fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FieldNames {
    /// The model.
    pub(crate) model: &'static str,
    /// The prompt, or what stands for it.
    pub(crate) input: &'static str,
    /// Messages of a chat.
    pub(crate) messages: &'static str,
    /// The bound on generated tokens.
    pub(crate) max_tokens: &'static str,
    /// Temperature.
    pub(crate) temperature: &'static str,
    /// Nucleus.
    pub(crate) top_p: &'static str,
    /// Stop strings.
    pub(crate) stop: &'static str,
    /// Alternatives a token.
    pub(crate) logprobs: &'static str,
    /// Choices.
    pub(crate) n: &'static str,
    /// What stands before the names of all other fields of the sampling.
    pub(crate) sampling: &'static str,
}
