//! Jinja as `transformers` sets it up for chat templates, in minijinja.

use std::io;
use std::string::FromUtf8Error;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::{strftime, tojson};

/// One a bytecode instruction and one per 64 bytes made: some tenths of a second, and 256 MB in all its values together.
const FUEL: u64 = 4_000_000;

/// `trim_blocks`, `lstrip_blocks`, loop controls, Python's methods on strings, lists and mappings, `raise_exception`, and
/// the filters and forms of output in which minijinja differs from Jinja2.
pub(super) fn new() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(write_value);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", tojson::tojson);
    environment.add_filter("trim", trim);
    environment.add_function("raise_exception", raise_exception);
    Ok(environment)
}

/// The function of that name, for one time.
pub(super) fn strftime_now(now: SystemTime) -> Value {
    Value::from_function(move |format: &str| {
        strftime::format(format, now).map_err(|reason| Error::new(ErrorKind::InvalidOperation, reason))
    })
}

/// JSON as a template sees it; objects keep their order.
pub(super) fn value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(truth) => Value::from(*truth),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(entries) => {
            Value::from_pairs(entries.iter().map(|(name, item)| (name.as_str(), value(item))))
        }
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Jinja2 prints Python's values.
fn write_value(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match python_word(value) {
        Some(word) => Ok(out.write_str(&word)?),
        None => minijinja::escape_formatter(out, state, value),
    }
}

fn python_word(value: &Value) -> Option<String> {
    match value.kind() {
        ValueKind::None => Some("None".to_owned()),
        ValueKind::Bool => Some(if value.is_true() { "True" } else { "False" }.to_owned()),
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok().map(tojson::float),
        _ => None,
    }
}

/// `str.strip`: Python also counts U+001C to U+001F as white space. Values other than strings become strings first.
fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = python_word(value).unwrap_or_else(|| value.to_string());
    match characters {
        Some(characters) => text.trim_matches(|character| characters.contains(character)).to_owned(),
        None => text.trim_matches(is_python_space).to_owned(),
    }
}

fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&character)
}

/// Output up to a limit.
pub(super) struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
    over: bool,
}

impl Bounded {
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), limit, over: false }
    }

    /// Whether something was refused.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    pub(super) fn into_string(self) -> Result<String, FromUtf8Error> {
        String::from_utf8(self.bytes)
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            self.over = true;
            return Err(io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
