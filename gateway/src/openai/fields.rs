//! Reading a request's fields: every complaint names the field and what it should have been. `null` is absent.

use serde_json::{Map, Value};

use crate::RequestError;

/// The fields of a request not read yet.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, RequestError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(RequestError::invalid("", "the request body must be a JSON object")),
            Err(error) => Err(RequestError::invalid("", format!("the request body is not JSON: {error}"))),
        }
    }

    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.0.swap_remove(field).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, field: &str) -> Result<Option<String>, RequestError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(field, "a string", &other)),
        }
    }

    pub(crate) fn bool(&mut self, field: &str) -> Result<bool, RequestError> {
        match self.take(field) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(wrong(field, "true or false", &other)),
        }
    }

    pub(crate) fn number(&mut self, field: &str) -> Result<Option<f32>, RequestError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        value.as_f64().map(|number| Some(number as f32)).ok_or_else(|| wrong(field, "a number", &value))
    }

    pub(crate) fn count(&mut self, field: &str) -> Result<Option<u64>, RequestError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        value.as_u64().map(Some).ok_or_else(|| wrong(field, "a whole number of at least 0", &value))
    }

    /// Any 64 bits.
    pub(crate) fn seed(&mut self, field: &str) -> Result<Option<u64>, RequestError> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let bits = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        bits.map(Some).ok_or_else(|| wrong(field, "an integer", &value))
    }

    /// One string or a list of them.
    pub(crate) fn strings(&mut self, field: &str) -> Result<Vec<String>, RequestError> {
        let one = |value: Value| match value {
            Value::String(text) => Ok(text),
            other => Err(wrong(field, "a string or a list of strings", &other)),
        };
        match self.take(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.into_iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    /// A list of them.
    pub(crate) fn token_ids(&mut self, field: &str) -> Result<Vec<u32>, RequestError> {
        match self.take(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => token_ids(field, values),
            Some(other) => Err(wrong(field, "a list of token ids", &other)),
        }
    }

    /// Refuses fields that OpenAI or its other servers know and this one does not serve, unless they ask for nothing.
    pub(crate) fn refuse(&mut self, unserved: &[(&str, &[&str])]) -> Result<(), RequestError> {
        for (field, neutral) in unserved {
            let Some(value) = self.take(field) else { continue };
            let asks_nothing = neutral.iter().any(|text| same(&value, text));
            if !asks_nothing {
                let message = format!("{field} is not served by this gateway; leave it out");
                return Err(RequestError::invalid(*field, message));
            }
        }
        Ok(())
    }

    /// Names nobody read.
    pub(crate) fn rest(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// Numbers are equal by value: 0, 0.0 and -0.0 are.
#[expect(clippy::float_cmp, reason = "a neutral value is that value")]
fn same(value: &Value, neutral: &str) -> bool {
    let Ok(neutral) = serde_json::from_str::<Value>(neutral) else { return false };
    match (value.as_f64(), neutral.as_f64()) {
        (Some(value), Some(neutral)) => value == neutral,
        _ => *value == neutral,
    }
}

/// `path` names the list.
pub(crate) fn token_ids(path: &str, values: Vec<Value>) -> Result<Vec<u32>, RequestError> {
    let id = |(index, value): (usize, Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(&format!("{path}[{index}]"), "a token id", &value))
    };
    values.into_iter().enumerate().map(id).collect()
}

/// A value of the wrong type.
pub(crate) fn wrong(field: &str, expected: &str, value: &Value) -> RequestError {
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    RequestError::invalid(field, format!("{field} must be {expected}, not {found}"))
}
