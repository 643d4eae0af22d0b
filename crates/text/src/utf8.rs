//! Bytes in pieces of any size -> text, never with half a character.

/// Decodes as `String::from_utf8_lossy` does on the whole (each maximal invalid part becomes one U+FFFD), but holds back
/// the bytes of a character that has begun. Linear in the bytes, whatever the cut.
#[derive(Default)]
pub(crate) struct Utf8Decoder {
    /// The beginning of a character, at most 3 bytes.
    begun: Vec<u8>,
}

impl Utf8Decoder {
    /// Appends to `out` what `bytes` completes. Gives how much of it is of earlier bytes alone: a character that had begun and
    /// that `bytes` do not go on with.
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut String) -> usize {
        let before = out.len();
        let mut earlier = 0;
        let carried = self.begun.len();
        self.begun.extend_from_slice(bytes);
        let mut rest = self.begun.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    self.begun.clear();
                    return earlier;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    // Half of a surrogate is waited for as `CPython`'s incremental decoder does, which shows it as a whole.
                    let half_surrogate = matches!(rest, [0xED, 0xA0..=0xBF]);
                    let Some(invalid) = error.error_len().filter(|_| !half_surrogate) else {
                        let done = self.begun.len() - rest.len();
                        self.begun.drain(..done);
                        return earlier;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid..];
                    if self.begun.len() - rest.len() <= carried {
                        earlier = out.len() - before;
                    }
                }
            }
        }
    }

    /// The character that has begun will not be completed.
    pub(crate) fn flush(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.begun));
        self.begun.clear();
    }

    /// Whether a character has begun.
    pub(crate) fn inside_character(&self) -> bool {
        !self.begun.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_cut_gives_the_lossy_text_of_the_whole(
            chunks in prop::collection::vec(
                prop::collection::vec(prop::sample::select(vec![0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE0, 0xE4, 0xED, 0xA0, 0xF0, 0x9F, 0xF4, 0x90, 0xFF]), 0..6),
                0..12,
            ),
        ) {
            let mut decoder = Utf8Decoder::default();
            let mut text = String::new();
            for chunk in &chunks {
                let before = text.len();
                decoder.push(chunk, &mut text);
                prop_assert!(text.is_char_boundary(before));
                prop_assert!(decoder.begun.len() <= 3);
            }
            decoder.flush(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&chunks.concat()).into_owned());
        }
    }
}
