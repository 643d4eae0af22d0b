//! What a client may ask its answer to match.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::{JsonCompileOptions, regex_to_lark};
use serde_json::Value;

use crate::GrammarError;
use crate::error::reason;

/// Bytes of a grammar's text, at most.
pub const MAX_GRAMMAR_BYTES: usize = 128 << 10;

/// White space between two tokens of JSON: a blank, or a line's end and the next one's indentation. Bounded, and taken once
/// at a place: a model that begins to repeat blanks has to go on with the document.
const JSON_WHITE_SPACE: &str = r"\x20|\x0D?\x0A[\x20\x09]{0,32}";

/// A grammar as text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// JSON that is valid by this JSON Schema.
    JsonSchema(String),
    /// Text of which all matches this regular expression.
    Regex(String),
    /// In the dialect of Lark that llguidance reads.
    Lark(String),
    /// One of these texts.
    Choices(Vec<String>),
}

impl Grammar {
    /// What it is, in messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "grammar",
            Self::Choices(_) => "choice",
        }
    }

    /// Bytes of its text.
    pub fn bytes(&self) -> usize {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            // A byte for what stands between two of them.
            Self::Choices(texts) => texts.iter().map(|text| text.len() + 1).sum(),
        }
    }

    /// As the library takes it.
    pub(crate) fn top_level(&self) -> Result<TopLevelGrammar, GrammarError> {
        let (kind, bytes) = (self.kind(), self.bytes());
        if bytes > MAX_GRAMMAR_BYTES {
            return Err(GrammarError::TooLarge { kind, bytes, limit: MAX_GRAMMAR_BYTES });
        }
        let bad = |reason: String| GrammarError::Bad { kind, reason };
        let grammar = match self {
            Self::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|error| bad(reason(&error)))?;
                GrammarWithLexer::from_json_schema(with_options(schema).map_err(bad)?)
            }
            Self::Regex(text) => GrammarWithLexer::from_lark(match without_anchors(text) {
                // Two slashes begin a comment.
                "" => "start: \"\"".to_owned(),
                text => format!("start: /{}/", regex_to_lark(text, "")),
            }),
            Self::Lark(text) => GrammarWithLexer::from_lark(text.clone()),
            Self::Choices(texts) => {
                if texts.is_empty() {
                    return Err(GrammarError::NoChoices);
                }
                // Lark's string literals are JSON's.
                let texts: Vec<String> =
                    texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                GrammarWithLexer::from_lark(format!("start: {}", texts.join(" | ")))
            }
        };
        Ok(TopLevelGrammar::from_grammar(grammar))
    }
}

/// All of the text has to match anyway.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        Some(rest) if (rest.len() - rest.trim_end_matches('\\').len()).is_multiple_of(2) => rest,
        _ => regex,
    }
}

/// The schema with our options, whatever it says of them itself.
fn with_options(schema: Value) -> Result<Value, String> {
    let mut schema = match schema {
        Value::Object(_) => schema,
        Value::Bool(true) => Value::Object(serde_json::Map::new()),
        Value::Bool(false) => return Err("no JSON is valid by false".to_owned()),
        other => return Err(format!("it must be an object or true, not {other}")),
    };
    let options = JsonCompileOptions {
        whitespace_pattern: Some(JSON_WHITE_SPACE.to_owned()),
        ..JsonCompileOptions::default()
    };
    options.apply_to(&mut schema);
    Ok(schema)
}
