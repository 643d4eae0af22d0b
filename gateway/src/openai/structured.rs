//! `response_format` of OpenAI and `structured_outputs` of `vLLM`: what the answer has to match.

use herd_proto::internal::v1::grammar::Kind;
use herd_proto::internal::v1::{Choices, Grammar};
use serde_json::{Map, Value};

use super::fields::{Fields, wrong};
use crate::RequestError;
use crate::request::GrammarRequest;

/// Any JSON object.
const ANY_OBJECT: &str = r#"{"type":"object"}"#;

/// Takes both fields; at most one may ask for something.
pub(crate) fn grammar(fields: &mut Fields) -> Result<Option<GrammarRequest>, RequestError> {
    let format = fields.take("response_format").map(response_format).transpose()?.flatten();
    let outputs = fields.take("structured_outputs").map(structured_outputs).transpose()?.flatten();
    match (format, outputs) {
        (Some(_), Some(outputs)) => {
            let message = format!("{} and response_format exclude each other", outputs.field);
            Err(RequestError::invalid(outputs.field, message))
        }
        (format, outputs) => Ok(format.or(outputs)),
    }
}

fn request(field: &str, kind: Kind) -> GrammarRequest {
    GrammarRequest { field: field.to_owned(), grammar: Grammar { kind: Some(kind) } }
}

fn response_format(value: Value) -> Result<Option<GrammarRequest>, RequestError> {
    let Value::Object(mut format) = value else { return Err(wrong("response_format", "an object", &value)) };
    let kind = format.get("type").and_then(Value::as_str).unwrap_or_default();
    match kind {
        "text" => Ok(None),
        "json_object" => Ok(Some(request("response_format", Kind::JsonSchema(ANY_OBJECT.to_owned())))),
        "json_schema" => {
            let field = "response_format.json_schema";
            let schema = match format.swap_remove("json_schema") {
                Some(Value::Object(mut schema)) => schema.swap_remove("schema"),
                other => return Err(wrong(field, "an object", &other.unwrap_or_default())),
            };
            let field = "response_format.json_schema.schema";
            Ok(Some(request(field, Kind::JsonSchema(schema_text(field, schema.unwrap_or_default())?))))
        }
        other => {
            let field = "response_format.type";
            let message =
                format!(r#"{field} is {other:?}; it must be "text", "json_object" or "json_schema""#);
            Err(RequestError::invalid(field, message))
        }
    }
}

/// A schema as JSON, or as text that is JSON.
fn schema_text(field: &str, schema: Value) -> Result<String, RequestError> {
    match schema {
        Value::String(text) => Ok(text),
        Value::Object(_) | Value::Bool(_) => Ok(schema.to_string()),
        other => Err(wrong(field, "a JSON schema", &other)),
    }
}

fn structured_outputs(value: Value) -> Result<Option<GrammarRequest>, RequestError> {
    let Value::Object(outputs) = value else { return Err(wrong("structured_outputs", "an object", &value)) };
    let mut asked: Option<GrammarRequest> = None;
    for (name, value) in asking(outputs) {
        let field = format!("structured_outputs.{name}");
        let kind = match (name.as_str(), value) {
            ("json", schema) => Kind::JsonSchema(schema_text(&field, schema)?),
            ("json_object", Value::Bool(true)) => Kind::JsonSchema(ANY_OBJECT.to_owned()),
            ("json_object", other) => return Err(wrong(&field, "true or false", &other)),
            ("regex", Value::String(text)) => Kind::Regex(text),
            ("grammar", Value::String(text)) => Kind::Lark(text),
            ("regex" | "grammar", other) => return Err(wrong(&field, "a string", &other)),
            ("choice", Value::Array(texts)) => {
                let text = |text: Value| match text {
                    Value::String(text) => Ok(text),
                    other => Err(wrong(&field, "a list of strings", &other)),
                };
                Kind::Choices(Choices { texts: texts.into_iter().map(text).collect::<Result<_, _>>()? })
            }
            ("choice", other) => return Err(wrong(&field, "a list of strings", &other)),
            _ => {
                let message = format!("{field} is not served by this gateway; leave it out");
                return Err(RequestError::invalid(field, message));
            }
        };
        if let Some(GrammarRequest { field: other, .. }) = &asked {
            let message = format!("{field} and {other} exclude each other");
            return Err(RequestError::invalid(field, message));
        }
        asked = Some(request(&field, kind));
    }
    Ok(asked)
}

/// Without switches that are off and what is null.
fn asking(outputs: Map<String, Value>) -> impl Iterator<Item = (String, Value)> {
    outputs.into_iter().filter(|(_, value)| !value.is_null() && *value != Value::Bool(false))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Option<GrammarRequest>, RequestError> {
        grammar(&mut Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    fn kind(body: &Value) -> (String, Kind) {
        let GrammarRequest { field, grammar } = read(body).unwrap().unwrap();
        (field, grammar.kind.unwrap())
    }

    #[test]
    fn every_kind_is_read() {
        for nothing in [
            json!({}),
            json!({"response_format": null}),
            json!({"response_format": {"type": "text"}}),
            json!({"structured_outputs": {"json": null, "json_object": false, "disable_fallback": false}}),
        ] {
            assert_eq!(read(&nothing).unwrap(), None, "{nothing}");
        }
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let text = r#"{"type":"object","properties":{"b":{},"a":{}}}"#;
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
        let field = "response_format.json_schema.schema".to_owned();
        assert_eq!(kind(&json!({"response_format": format})), (field, Kind::JsonSchema(text.to_owned())));
        let any = ("response_format".to_owned(), Kind::JsonSchema(ANY_OBJECT.to_owned()));
        assert_eq!(kind(&json!({"response_format": {"type": "json_object"}})), any);
        let of = |name: &str, value: Value| kind(&json!({"structured_outputs": {name: value}}));
        assert_eq!(of("json", schema).1, Kind::JsonSchema(text.to_owned()));
        assert_eq!(of("json", json!("{}")).1, Kind::JsonSchema("{}".to_owned()));
        assert_eq!(of("json_object", json!(true)).1, Kind::JsonSchema(ANY_OBJECT.to_owned()));
        assert_eq!(
            of("regex", json!("a+")),
            ("structured_outputs.regex".to_owned(), Kind::Regex("a+".to_owned()))
        );
        assert_eq!(of("grammar", json!("start: \"a\"")).1, Kind::Lark("start: \"a\"".to_owned()));
        let texts = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(of("choice", json!(["a", "b"])).1, Kind::Choices(Choices { texts }));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"structured_outputs": []}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": 1}}), "structured_outputs.regex"),
            (json!({"structured_outputs": {"choice": ["a", 1]}}), "structured_outputs.choice"),
            (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
            (json!({"structured_outputs": {"regex": "a", "json": {}}}), "structured_outputs.json"),
            (
                json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
                "structured_outputs.regex",
            ),
        ] {
            let error = read(&body).unwrap_err();
            assert!(matches!(&error, RequestError::Invalid { field: at, .. } if at == field), "{error:?}");
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
