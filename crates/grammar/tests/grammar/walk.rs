//! Walks that take any token that is allowed.

use herd_engine::Constraint as _;
use herd_grammar::{Compiled, Grammar};
use proptest::prelude::*;

use super::{
    ARITHMETIC, VOCABULARY, Value, bytes, choices, compile, is_arithmetic, is_person, lark, person, regex,
    schema, text,
};

/// Takes tokens that `pick` picks from what is allowed until the text is whole, or `most` of them.
fn walk(
    grammar: &Compiled,
    most: usize,
    mut pick: impl FnMut(&[u32], bool) -> Option<u32>,
) -> (Vec<u32>, bool) {
    let mut constraint = grammar.constraint(&[]).unwrap();
    let mut ids = Vec::new();
    while ids.len() < most {
        if constraint.is_complete() {
            assert!(constraint.can_end());
            return (ids, true);
        }
        let allowed = constraint.allowed().unwrap();
        let allowed: Vec<u32> = (0..2000).filter(|id| allowed.contains(*id)).collect();
        assert!(!allowed.is_empty(), "stuck after {:?}", bytes(&ids));
        assert!(allowed.iter().all(|id| VOCABULARY.text_bytes(*id).is_some()), "control tokens are no text");
        match pick(&allowed, constraint.can_end()) {
            Some(id) => {
                constraint.advance(id).unwrap();
                ids.push(id);
            }
            None => return (ids, true),
        }
    }
    (ids, constraint.can_end())
}

/// Picks at random, and ends one time in four where it may.
fn at_random(seed: u64) -> impl FnMut(&[u32], bool) -> Option<u32> {
    let mut state = seed;
    move |allowed, can_end| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let number = (state >> 33) as usize;
        (!can_end || !number.is_multiple_of(4)).then(|| allowed[(number / 4) % allowed.len()])
    }
}

fn check(grammar: &Grammar, seed: u64, matches: impl Fn(&str) -> bool) {
    let (ids, ended) = walk(&compile(grammar), 400, at_random(seed));
    if ended {
        let text = text(&ids);
        assert!(matches(&text), "{text:?} does not match {grammar:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_is_drawn_the_answer_matches(seed: u64) {
        check(&schema(&person()), seed, is_person);
        check(&lark(ARITHMETIC), seed, is_arithmetic);
        let pattern = r"(\d{3}-)?[a-f]{2,4}(ä|\u{1F600})?[^x\n]";
        let whole = regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
        check(&regex(pattern), seed, |text| whole.is_match(text));
        let texts = ["yes", "no", "yes, but \"not\" now", "a\\b\n/c/"];
        check(&choices(&texts), seed, |text| texts.contains(&text));
        check(&schema(&serde_json::json!({"type": "object"})), seed, |text| {
            // An exponent may have any number of digits; no f64 holds it.
            let too_large = |error: &serde_json::Error| error.to_string().starts_with("number out of range");
            serde_json::from_str::<Value>(text).map_or_else(|error| too_large(&error), |value| value.is_object())
        });
    }

    /// The state is a function of the tokens: replayed at any place it is the same.
    #[test]
    fn replayed_it_is_the_same(seed: u64, cut: prop::sample::Index) {
        for grammar in [schema(&person()), lark(ARITHMETIC), regex("[a-z]+ [a-z]+")] {
            let compiled = compile(&grammar);
            let (ids, _) = walk(&compiled, 60, at_random(seed));
            let cut = cut.index(ids.len() + 1);
            let mut replayed = compiled.constraint(&ids[..cut]).unwrap();
            let mut along = compiled.constraint(&[]).unwrap();
            for id in &ids[..cut] {
                along.advance(*id).unwrap();
            }
            for id in &ids[cut..] {
                prop_assert_eq!(replayed.allowed().unwrap(), along.allowed().unwrap());
                prop_assert_eq!(replayed.can_end(), along.can_end());
                along.advance(*id).unwrap();
                replayed.advance(*id).unwrap();
            }
            prop_assert_eq!(replayed.is_complete(), along.is_complete());
        }
    }
}

#[test]
fn a_text_that_nothing_can_follow_is_complete_and_one_that_may_end_is_not() {
    let spelled = |text: &str| -> Vec<u32> {
        text.bytes()
            .map(|byte| (0..1024).find(|id| VOCABULARY.text_bytes(*id) == Some(&[byte])).unwrap())
            .collect()
    };
    let state = |grammar: &Grammar, text: &str| {
        let constraint = compile(grammar).constraint(&spelled(text)).unwrap();
        (constraint.can_end(), constraint.is_complete())
    };
    assert_eq!(state(&regex("[0-9]+"), "12"), (true, false));
    assert_eq!(state(&regex("[0-9]{2}"), "1"), (false, false));
    assert_eq!(state(&regex("[0-9]{2}"), "12"), (true, true));
    assert_eq!(state(&regex("a?"), ""), (true, false));
    assert_eq!(state(&regex(""), ""), (true, true));
    assert_eq!(state(&regex("^ab$"), "ab"), (true, true));
    assert_eq!(state(&regex(r"^a\$"), "a"), (false, false));
    assert_eq!(state(&regex(r"a\\$"), r"a\"), (true, true));
    assert_eq!(state(&choices(&["no", "none"]), "no"), (true, false));
    let object = schema(&serde_json::json!({"type": "object"}));
    assert_eq!(state(&object, "{"), (false, false));
    assert_eq!(state(&object, r#"{"a": [1, 2.5e3]}"#), (true, true));
    assert_eq!(state(&lark(ARITHMETIC), "=(1+2)"), (true, true));
    let error = compile(&regex("ab")).constraint(&spelled("ax")).unwrap_err();
    assert!(
        error.to_string().starts_with("token 1 of the choice does not follow the regular expression"),
        "{error}"
    );
}

/// A model that says nothing but white space where it can must come to the end of what is allowed: it is bounded in length,
/// and cannot begin again. (Within a string blanks are text, which `maxLength` bounds.)
#[test]
fn white_space_is_bounded() {
    let white =
        |id: &u32| VOCABULARY.text_bytes(*id).is_some_and(|bytes| bytes.iter().all(u8::is_ascii_whitespace));
    let bools = serde_json::json!({
        "type": "array", "items": {"type": "boolean"}, "x-guidance": {"whitespace_pattern": " +"}
    });
    for asked in [serde_json::json!({"enum": [{"a": 1}, [2, 3]]}), person(), bools] {
        let (mut run, mut longest, mut seen) = (0, 0, 0);
        let mut random = at_random(1);
        walk(&compile(&schema(&asked)), 2000, |allowed, can_end| {
            if let Some(id) = allowed.iter().find(|id| white(id)) {
                run += VOCABULARY.text_bytes(*id).unwrap().len();
                seen += 1;
                longest = longest.max(run);
                return Some(*id);
            }
            run = 0;
            random(allowed, can_end)
        });
        assert!(seen > 0, "there is white space");
        assert!(longest <= 40, "{longest} bytes of white space in a row for {asked}");
    }
}
