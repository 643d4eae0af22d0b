//! Sizes on the command line.

/// Bytes: a whole number and one of the units, of which `expected` names those that errors offer.
pub(crate) fn parse(text: &str, units: &[(&str, u64)], expected: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let given = &text[digits.len()..];
    let Some((_, unit)) = units.iter().find(|(name, _)| *name == given) else {
        return Err(format!("{given:?} is not {expected}"));
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("{digits:?} is not a whole number"))?;
    number.checked_mul(*unit).ok_or_else(|| format!("{text} is too much"))
}
