//! Grammars that are wrong, too large, or meant to do harm: an error each, in bounded time, and nothing worse.

use herd_engine::Constraint as _;
use herd_grammar::{Grammar, GrammarError, MAX_GRAMMAR_BYTES};
use serde_json::json;

use super::{COMPILER, choices, compile, lark, regex, schema};

fn refused(grammar: &Grammar) -> String {
    let error = COMPILER.compile(grammar).unwrap_err().to_string();
    assert!(error.len() < 700, "{error}");
    error
}

#[test]
fn what_is_wrong_is_said() {
    for (grammar, says) in [
        (Grammar::JsonSchema("{".to_owned()), "the JSON schema cannot be used: EOF"),
        (Grammar::JsonSchema("3".to_owned()), "it must be an object or true, not 3"),
        (Grammar::JsonSchema("false".to_owned()), "no JSON is valid by false"),
        (schema(&json!({"type": "thing"})), "thing"),
        (schema(&json!({"$ref": "https://example.com/schema"})), "https://example.com/schema"),
        (schema(&json!({"type": "integer", "minimum": 3, "maximum": 2})), "the JSON schema cannot be used"),
        (regex("(a"), "the regular expression cannot be used: "),
        (regex("[b-a]"), "the regular expression cannot be used: "),
        (lark("begin: \"a\""), "the grammar cannot be used: "),
        (lark("start: nothing"), "nothing"),
        (lark(""), "the grammar cannot be used: "),
        (lark("start: <|eot_id|>"), "the grammar cannot be used: "),
        (choices(&[]), "choice is empty"),
    ] {
        let error = refused(&grammar);
        assert!(error.contains(says), "{grammar:?}: {error}");
    }
    let long = regex(&"a".repeat(MAX_GRAMMAR_BYTES + 1));
    assert!(matches!(COMPILER.compile(&long), Err(GrammarError::TooLarge { .. })));
}

/// Deeply nested, or small and large once compiled. Each is compiled or refused; a stack that overflows would end the process.
#[test]
fn no_grammar_ends_the_process() {
    let nested =
        |open: &str, close: &str, depth: usize| format!("{}a{}", open.repeat(depth), close.repeat(depth));
    let deep = MAX_GRAMMAR_BYTES / 2 - 100;
    let mut tried = 0;
    for grammar in [
        regex(&nested("(", ")", deep)),
        regex(&nested("(?:a|", ")", deep / 4)),
        regex(&nested("(", ")?", 200)),
        regex("((((a{100}){100}){100}){100}){100}"),
        regex("(a|aa)*(b|bb)*(ab|a|b)*{50}"),
        regex(&format!("{}x", "a?".repeat(20_000))),
        regex(r"[\p{L}\p{N}]{1,1000}(?:\.[\p{L}]{1,1000}){1,1000}"),
        lark(&format!("start: {}", nested("(", ")", deep).replace('a', "\"a\""))),
        lark(&format!("start: {}", nested("[", "]", deep).replace('a', "\"a\""))),
        lark("start: start start | \"a\" | \"\""),
        lark("start: \"a\"{1000000000}"),
        lark(
            "start: a a a a a a a a\na: b b b b b b b b\nb: c c c c c c c c\nc: d? d? d? d?\nd: \"a\" | \"b\" | \"\"",
        ),
        Grammar::JsonSchema(nested("{\"items\":", "}", 10_000).replace('a', "{}")),
        Grammar::JsonSchema(nested("{\"items\":", "}", 100).replace('a', "{}")),
        Grammar::JsonSchema(nested("{\"anyOf\":[{},", "]}", 60).replace('a', "{}")),
        schema(&json!({"$ref": "#"})),
        schema(&json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]})),
        schema(&json!({"type": "string", "minLength": 100_000_000})),
        schema(&json!({"type": "array", "items": {"type": "array", "minItems": 10_000}, "minItems": 10_000})),
        schema(&json!({"type": "string", "pattern": "^(a+)+$", "maxLength": 10_000})),
    ] {
        tried += 1;
        let Ok(compiled) = COMPILER.compile(&grammar) else { continue };
        let mut constraint = compiled.constraint(&[]).unwrap();
        for _ in 0..30 {
            let Ok(allowed) = constraint.allowed() else { break };
            let Some(id) = (0..1024).rev().find(|id| allowed.contains(*id)) else { break };
            if constraint.advance(id).is_err() {
                break;
            }
        }
        drop(constraint.boxed_clone());
    }
    assert_eq!(tried, 20);
    assert!(compile(&regex("ok")).constraint(&[]).is_ok(), "and the next one is served");
}
