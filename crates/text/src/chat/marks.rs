//! Marks that stand for control tokens while a template runs.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::Segment;
use crate::vocabulary::AddedToken;

/// Where the mark comes from: private use, plane 16. Neither white space nor letters with a case, and JSON leaves them as
/// they are.
const MARKS: std::ops::RangeInclusive<u32> = 0x10_0000..=0x10_FFFD;
/// The character after a mark is this plus the token's place in the list: private use, plane 15.
const INDEX_BASE: u32 = 0xF_0000;

/// The control tokens that a template can write.
pub(super) struct Marks {
    /// Longest first.
    tokens: Vec<AddedToken>,
    first_bytes: [bool; 256],
}

impl Marks {
    /// Control tokens of letters, digits and spaces alone, or with characters that mean something to Jinja, are left out:
    /// they cannot be told from the template's code. Nothing becomes one of them.
    pub(super) fn new(added: &[AddedToken]) -> Self {
        let plain =
            |character: char| character.is_alphanumeric() || character.is_whitespace() || character == '_';
        let mut tokens: Vec<AddedToken> = added
            .iter()
            .filter(|token| token.is_control())
            .filter(|token| !token.content.chars().all(plain))
            .filter(|token| !token.content.contains(['{', '}', '\'', '"', '\\']))
            .take((MARKS.end() - MARKS.start()) as usize)
            .cloned()
            .collect();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.content.len()));
        let mut first_bytes = [false; 256];
        for token in &tokens {
            if let Some(&byte) = token.content.as_bytes().first() {
                first_bytes[usize::from(byte)] = true;
            }
        }
        Self { tokens, first_bytes }
    }

    /// `text` with each literal replaced by its mark; where several match, the longest.
    pub(super) fn apply(&self, text: &str, mark: char) -> String {
        let mut marked = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            if let Some(index) = self.starting(rest) {
                marked.push(mark);
                marked.extend(char::from_u32(INDEX_BASE + index as u32));
                rest = &rest[self.tokens[index].content.len()..];
            } else {
                marked.push(character);
                rest = &rest[character.len_utf8()..];
            }
        }
        marked
    }

    /// The segments of a rendered text; `None` if a mark is not whole.
    pub(super) fn split(&self, rendered: &str, mark: char) -> Option<Vec<Segment>> {
        let mut segments = Vec::new();
        let mut parts = rendered.split(mark);
        let mut text = parts.next()?;
        for part in parts {
            let index = part.chars().next()?;
            let token = self.tokens.get(u32::from(index).checked_sub(INDEX_BASE)? as usize)?;
            push_text(&mut segments, if token.lstrip { text.trim_end() } else { text });
            segments.push(Segment::Control(token.id));
            text = &part[index.len_utf8()..];
            text = if token.rstrip { text.trim_start() } else { text };
        }
        push_text(&mut segments, text);
        Some(segments)
    }

    /// A control token's literal that stands in `text`.
    pub(super) fn literal_in<'a>(&'a self, text: &str) -> Option<&'a str> {
        let index = text.char_indices().find_map(|(place, _)| self.starting(&text[place..]))?;
        Some(&self.tokens[index].content)
    }

    fn starting(&self, text: &str) -> Option<usize> {
        let first = *text.as_bytes().first()?;
        if !self.first_bytes[usize::from(first)] {
            return None;
        }
        self.tokens.iter().position(|token| text.starts_with(&token.content))
    }
}

fn push_text(segments: &mut Vec<Segment>, text: &str) {
    if !text.is_empty() {
        segments.push(Segment::Text(text.to_owned()));
    }
}

/// A mark that occurs in none of the texts.
pub(super) fn unused<'a>(texts: impl IntoIterator<Item = &'a str>) -> Option<char> {
    let used: BTreeSet<u32> =
        texts.into_iter().flat_map(str::chars).map(u32::from).filter(|code| MARKS.contains(code)).collect();
    MARKS.into_iter().find(|code| !used.contains(code)).and_then(char::from_u32)
}

/// All strings in a JSON object, names too.
pub(super) fn strings_of<'a>(object: &'a Map<String, Value>, strings: &mut Vec<&'a str>) {
    for (name, value) in object {
        strings.push(name);
        strings_in(value, strings);
    }
}

fn strings_in<'a>(value: &'a Value, strings: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => strings.push(text),
        Value::Array(list) => list.iter().for_each(|value| strings_in(value, strings)),
        Value::Object(object) => strings_of(object, strings),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
