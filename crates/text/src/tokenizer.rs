//! Text -> ids, with a tokenizer that has never heard of control tokens.

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use crate::TextError;
use crate::bundle::TOKENIZER;
use crate::vocabulary::{AddedToken, Vocabulary};

/// Byte-level BPE over plain text.
///
/// The control tokens are taken out of `tokenizer.json` before the tokenizer is built, so no text can give one: their
/// literals are tokenized as any other text is. The unknown token goes too: a byte that the vocabulary has no token for
/// (`SmolLM2` lacks six ASCII controls) is left out, as reference tokenizers do without one. So do truncation and padding,
/// which would change prompts silently.
pub(crate) struct PlainTokenizer(Tokenizer);

/// What `tokenizer.json` says.
pub(crate) struct ParsedTokenizer {
    pub(crate) plain: PlainTokenizer,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) added: Vec<AddedToken>,
    /// The control token that the post-processor puts in front of a text.
    pub(crate) first: Option<u32>,
}

/// `file` is the parsed `tokenizer.json`, `vocab_size` the rows of the embedding.
pub(crate) fn parse(mut file: Value, vocab_size: usize) -> Result<ParsedTokenizer, TextError> {
    require_byte_level(&file)?;
    let listed = file.get_mut("added_tokens").map(Value::take).filter(|listed| !listed.is_null());
    let listed: Vec<Value> = from_value(listed.unwrap_or_else(|| json!([])))?;
    let added: Vec<AddedToken> = from_value(Value::Array(listed.clone()))?;
    let plain_added =
        listed.into_iter().zip(&added).filter(|(_, token)| !token.is_control()).map(|(value, _)| value);
    let plain_added: Vec<Value> = plain_added.collect();
    let first = file.get("post_processor").and_then(first_token);

    let entries = file
        .pointer_mut("/model/vocab")
        .and_then(Value::as_object_mut)
        .ok_or_else(|| bad("model.vocab is not an object".to_owned()))?;
    let vocabulary = Vocabulary::new(pieces(entries)?.into_iter(), &added, vocab_size)?;
    for token in &added {
        if token.is_control() {
            entries.swap_remove(&token.content);
        } else {
            // An added token keeps its id only if the model has it: otherwise they are numbered anew.
            entries.insert(token.content.clone(), json!(token.id));
        }
    }

    file["added_tokens"] = Value::Array(plain_added);
    file["truncation"] = Value::Null;
    file["padding"] = Value::Null;
    file["post_processor"] = Value::Null;
    file["model"]["unk_token"] = Value::Null;
    let bytes = serde_json::to_vec(&file).map_err(|error| bad(error.to_string()))?;
    let tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| bad(error.to_string()))?;
    for token in added.iter().filter(|token| !token.is_control()) {
        if tokenizer.token_to_id(&token.content) != Some(token.id) {
            return Err(bad(format!("the added token {:?} has no id of its own", token.content)));
        }
    }
    Ok(ParsedTokenizer { plain: PlainTokenizer(tokenizer), vocabulary, added, first })
}

/// The vocabulary alone, of the parsed `tokenizer.json`.
pub(crate) fn vocabulary(file: &Value, vocab_size: usize) -> Result<Vocabulary, TextError> {
    require_byte_level(file)?;
    let listed = file.get("added_tokens").filter(|listed| !listed.is_null()).cloned();
    let added: Vec<AddedToken> = from_value(listed.unwrap_or_else(|| json!([])))?;
    let entries = file.pointer("/model/vocab").and_then(Value::as_object);
    let entries = entries.ok_or_else(|| bad("model.vocab is not an object".to_owned()))?;
    Vocabulary::new(pieces(entries)?.into_iter(), &added, vocab_size)
}

impl PlainTokenizer {
    /// Appends the ids of `text`, which came in the request's `field`.
    pub(crate) fn encode(
        &self,
        text: &str,
        field: &'static str,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        if has_run_of_spaces(text, MAX_SPACES) {
            let reason = format!("it has more than {MAX_SPACES} white-space characters in a row");
            return Err(TextError::Encode { field, reason });
        }
        let encoding = self
            .0
            .encode_fast(text, false)
            .map_err(|error| TextError::Encode { field, reason: error.to_string() })?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// In a pre-tokenizer's `\s*[\r\n]+` each of them is a step back. At the millionth fancy-regex gives up, and `tokenizers`
/// then takes the rest of the text for one word without a sign of it.
const MAX_SPACES: usize = 250_000;

fn has_run_of_spaces(text: &str, limit: usize) -> bool {
    let mut run = 0;
    text.len() > limit
        && text.chars().any(|character| {
            run = if character.is_whitespace() { run + 1 } else { 0 };
            run > limit
        })
}

fn require_byte_level(file: &Value) -> Result<(), TextError> {
    let kind = |part: &str| {
        file.get(part).and_then(|part| part.get("type")).and_then(Value::as_str).unwrap_or("none").to_owned()
    };
    let unsupported = |part: &str, kind: &str| {
        Err(TextError::UnsupportedTokenizer { what: format!("a {part} of type {kind}") })
    };
    if kind("model") != "BPE" {
        return unsupported("model", &kind("model"));
    }
    if kind("decoder") != "ByteLevel" {
        return unsupported("decoder", &kind("decoder"));
    }
    let pre_tokenizer = file.get("pre_tokenizer").unwrap_or(&Value::Null);
    let parts = pre_tokenizer.get("pretokenizers").and_then(Value::as_array);
    let byte_level = match parts {
        Some(parts) => parts.iter().any(|part| part["type"] == "ByteLevel"),
        None => pre_tokenizer["type"] == "ByteLevel",
    };
    if !byte_level {
        return unsupported("pre_tokenizer", &kind("pre_tokenizer"));
    }
    Ok(())
}

fn from_value<T: serde::de::DeserializeOwned>(added_tokens: Value) -> Result<T, TextError> {
    serde_json::from_value(added_tokens).map_err(|error| bad(format!("added_tokens: {error}")))
}

fn pieces(entries: &Map<String, Value>) -> Result<Vec<(&str, u32)>, TextError> {
    entries
        .iter()
        .map(|(piece, id)| {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            id.map(|id| (piece.as_str(), id)).ok_or_else(|| bad(format!("{piece:?} has no id")))
        })
        .collect()
}

/// The token that a `TemplateProcessing` (alone or in a `Sequence`) puts before a single text.
fn first_token(post_processor: &Value) -> Option<u32> {
    if let Some(parts) = post_processor.get("processors").and_then(Value::as_array) {
        return parts.iter().find_map(first_token);
    }
    let name = post_processor.pointer("/single/0/SpecialToken/id")?.as_str()?;
    let id = post_processor.get("special_tokens")?.get(name)?.pointer("/ids/0")?.as_u64()?;
    u32::try_from(id).ok()
}

fn bad(reason: String) -> TextError {
    TextError::BadFile { file: TOKENIZER, reason }
}
