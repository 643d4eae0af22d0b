//! Grammars under the tiny model's tokenizer: alone, and as constraints of an engine.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is how a test fails")]

mod apart;
mod engine;
mod hostile;
mod walk;

use std::sync::LazyLock;

use herd_grammar::{Compiled, Compiler, Grammar};
use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, Vocabulary};
use serde_json::Value;

fn files() -> BundleFiles {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = dir.join("../../fixtures/tiny-llama31/tiny-llama31-bf16");
    BUNDLE_FILE_NAMES.iter().filter_map(|name| Some((*name, std::fs::read(dir.join(name)).ok()?))).collect()
}

static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(|| Vocabulary::from_files(&files()).unwrap());
static COMPILER: LazyLock<Compiler> = LazyLock::new(|| Compiler::new(&VOCABULARY).unwrap());

fn compile(grammar: &Grammar) -> Compiled {
    COMPILER.compile(grammar).unwrap()
}

fn schema(schema: &Value) -> Grammar {
    Grammar::JsonSchema(schema.to_string())
}

fn regex(text: &str) -> Grammar {
    Grammar::Regex(text.to_owned())
}

fn lark(text: &str) -> Grammar {
    Grammar::Lark(text.to_owned())
}

fn choices(texts: &[&str]) -> Grammar {
    Grammar::Choices(texts.iter().map(|text| (*text).to_owned()).collect())
}

/// The bytes of ids, of which control tokens have none.
fn bytes(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| VOCABULARY.text_bytes(*id).unwrap_or_default().to_vec()).collect()
}

fn text(ids: &[u32]) -> String {
    String::from_utf8(bytes(ids)).unwrap()
}

/// A schema that every walk comes to an end of.
fn person() -> Value {
    serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog", 7, null]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": false,
    })
}

/// Whether a text is JSON that is valid by [`person`].
fn is_person(text: &str) -> bool {
    let Ok(Value::Object(person)) = serde_json::from_str::<Value>(text) else { return false };
    let tags = person.get("tags").and_then(Value::as_array);
    person.len() == 4
        && person["name"].as_str().is_some_and(|name| name.chars().count() <= 5)
        && person["age"].as_u64().is_some_and(|age| age <= 120)
        && ["cat".into(), "dog".into(), 7.into(), Value::Null].contains(&person["kind"])
        && tags.is_some_and(|tags| (1..=3).contains(&tags.len()) && tags.iter().all(Value::is_boolean))
}

/// A calculator's language.
const ARITHMETIC: &str = r#"
start: "=" term
term: NUMBER | "(" term OPERATOR term ")"
OPERATOR: "+" | "-"
NUMBER: /[1-9][0-9]{0,2}/
"#;

/// Whether a text is of [`ARITHMETIC`].
fn is_arithmetic(text: &str) -> bool {
    fn term(text: &str) -> Option<&str> {
        if let Some(rest) = text.strip_prefix('(') {
            return term(term(rest)?.strip_prefix(['+', '-'])?)?.strip_prefix(')');
        }
        let rest = text.trim_start_matches(|digit: char| digit.is_ascii_digit());
        let number = &text[..text.len() - rest.len()];
        ((1..=3).contains(&number.len()) && !number.starts_with('0')).then_some(rest)
    }
    text.strip_prefix('=').and_then(term) == Some("")
}
