//! Names that a person can read: in logs, headers, labels and lists, two that look alike are the same, and none moves the text
//! around it.

use std::fmt::Write as _;

/// First and last of the characters that show nothing, or change how others are shown, as Unicode has them: controls, spaces,
/// zero-width and directional ones, fillers, selectors of variants, tags. No pattern names them by their category: which
/// characters a category has depends on who reads it.
const INVISIBLE: [(char, char); 24] = [
    ('\u{0}', '\u{20}'),
    ('\u{7f}', '\u{a0}'),
    ('\u{ad}', '\u{ad}'),
    ('\u{34f}', '\u{34f}'),
    ('\u{61c}', '\u{61c}'),
    ('\u{115f}', '\u{1160}'),
    ('\u{1680}', '\u{1680}'),
    ('\u{17b4}', '\u{17b5}'),
    ('\u{180b}', '\u{180f}'),
    ('\u{2000}', '\u{200f}'),
    ('\u{2028}', '\u{202f}'),
    ('\u{205f}', '\u{206f}'),
    ('\u{2800}', '\u{2800}'),
    ('\u{3000}', '\u{3000}'),
    ('\u{3164}', '\u{3164}'),
    ('\u{fe00}', '\u{fe0f}'),
    ('\u{feff}', '\u{feff}'),
    ('\u{ffa0}', '\u{ffa0}'),
    ('\u{fff0}', '\u{fffb}'),
    ('\u{fffe}', '\u{ffff}'),
    ('\u{13430}', '\u{13455}'),
    ('\u{1bca0}', '\u{1bca3}'),
    ('\u{1d173}', '\u{1d17a}'),
    ('\u{e0000}', '\u{e0fff}'),
];

/// Whether a name has characters, and all of them can be seen.
pub fn is_visible(name: &str) -> bool {
    let hidden = |c: char| INVISIBLE.iter().any(|(first, last)| (*first..=*last).contains(&c));
    !name.is_empty() && !name.contains(hidden)
}

/// The same as a rule of the schema, in CEL.
pub(crate) fn rule(name: &str) -> String {
    format!("{name}.matches(r'{}')", pattern())
}

/// As RE2 has it.
fn pattern() -> String {
    let mut pattern = "^[^".to_owned();
    for (first, last) in INVISIBLE {
        // Writing to a string cannot fail.
        let _ = write!(pattern, "\\x{{{:x}}}", u32::from(first));
        if first != last {
            let _ = write!(pattern, "-\\x{{{:x}}}", u32::from(last));
        }
    }
    pattern + "]+$"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_no_name() {
        for name in
            ["smollm2", "meta-llama/Llama-3.1-8B:fp8", "通义千问", "çedilla", "a\u{301}", "🦙", "{\"a\"}"]
        {
            assert!(is_visible(name), "{name}");
        }
        assert!(!is_visible(""));
        for hidden in [" ", "\n", "\u{7f}", "\u{85}", "\u{a0}", "\u{ad}", "\u{200b}", "\u{200d}", "\u{202e}"]
        {
            assert!(!is_visible(hidden) && !is_visible(&format!("a{hidden}b")), "{hidden:?}");
        }
        for hidden in ["\u{2028}", "\u{2060}", "\u{2066}", "\u{3164}", "\u{fe0f}", "\u{feff}", "\u{e0061}"] {
            assert!(!is_visible(&format!("a{hidden}")), "{hidden:?}");
        }
    }

    #[test]
    fn the_pattern_says_the_same() {
        let pattern = regex::Regex::new(&pattern()).unwrap();
        for c in '\0'..=char::MAX {
            let name = c.to_string();
            assert_eq!(pattern.is_match(&name), is_visible(&name), "{c:?}");
        }
        assert!(!pattern.is_match("") && !pattern.is_match("a\u{200b}b") && pattern.is_match("a/b"));
    }
}
