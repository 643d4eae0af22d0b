//! Which id is which bytes, and which ids are control tokens.

use std::collections::HashMap;

use serde::Deserialize;

use crate::bundle::TOKENIZER;
use crate::{BundleFiles, TextError, tokenizer};

/// An added token as `tokenizer.json` writes it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) id: u32,
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
    #[serde(default)]
    pub(crate) special: bool,
}

impl AddedToken {
    /// Marked special, or written like one: some models leave the mark off (`<｜User｜>`). All others (runs of spaces,
    /// `</think>`) are ordinary vocabulary that users may write.
    pub(crate) fn is_control(&self) -> bool {
        let delimited = |open, close| self.content.starts_with(open) && self.content.ends_with(close);
        self.special || delimited("<|", "|>") || delimited("<｜", "｜>")
    }
}

/// Id -> bytes for every id of a byte-level BPE vocabulary, exact: nothing is stripped, joined or cleaned up.
#[derive(PartialEq, Eq)]
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Where each id's bytes end in `bytes`; they begin where the last id's end.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    /// Bytes of the longest token.
    longest: usize,
    /// By text.
    control: HashMap<String, u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Absent,
    Text,
    Control,
}

impl Vocabulary {
    /// Of a model's files; `tokenizer.json` and `config.json` are read.
    pub fn from_files(files: &BundleFiles) -> Result<Self, TextError> {
        tokenizer::vocabulary(&files.tokenizer()?, files.config()?.vocab_size)
    }

    /// `pieces` are the model's entries, written in the byte-level alphabet; `added` go before them.
    pub(crate) fn new<'a>(
        pieces: impl Iterator<Item = (&'a str, u32)>,
        added: &[AddedToken],
        vocab_size: usize,
    ) -> Result<Self, TextError> {
        let mut tokens = vec![(Kind::Absent, Vec::new()); vocab_size];
        let outside = |id: u32| TextError::VocabularySize { largest_id: id as usize, vocab_size };
        for (piece, id) in pieces {
            let slot = tokens.get_mut(id as usize).ok_or_else(|| outside(id))?;
            if slot.0 != Kind::Absent {
                return Err(bad(format!("id {id} stands for {piece:?} and for another token")));
            }
            *slot = (Kind::Text, piece_bytes(piece));
        }
        let mut control = HashMap::new();
        for token in added {
            let slot = tokens.get_mut(token.id as usize).ok_or_else(|| outside(token.id))?;
            let kind = if token.is_control() { Kind::Control } else { Kind::Text };
            if kind == Kind::Control && control.insert(token.content.clone(), token.id).is_some() {
                return Err(bad(format!("{:?} is added twice", token.content)));
            }
            *slot = (kind, token.content.clone().into_bytes());
        }
        let largest_id = tokens.iter().rposition(|(kind, _)| *kind != Kind::Absent).unwrap_or(0);
        if largest_id + MAX_PADDING_ROWS < vocab_size {
            return Err(TextError::VocabularySize { largest_id, vocab_size });
        }

        let longest = tokens.iter().map(|(_, bytes)| bytes.len()).max().unwrap_or(0);
        let mut vocabulary =
            Self { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), longest, control };
        for (kind, bytes) in tokens {
            vocabulary.bytes.extend_from_slice(&bytes);
            vocabulary.ends.push(vocabulary.bytes.len() as u32);
            vocabulary.kinds.push(kind);
        }
        Ok(vocabulary)
    }

    /// Rows of the embedding: ids are below it.
    pub fn size(&self) -> usize {
        self.kinds.len()
    }

    pub(crate) fn longest(&self) -> usize {
        self.longest
    }

    /// The bytes that the token adds to an output; `None` for control tokens and ids without a token.
    pub fn text_bytes(&self, id: u32) -> Option<&[u8]> {
        (self.kind(id) == Kind::Text).then(|| self.bytes(id))
    }

    /// The bytes of any token, of a control token its name; empty for an id without a token.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[begin as usize..end as usize]
    }

    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.kind(id) == Kind::Control
    }

    /// The id of a control token, by its exact text.
    pub(crate) fn control_id(&self, text: &str) -> Option<u32> {
        self.control.get(text).copied()
    }

    fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Absent)
    }
}

/// Embeddings are padded to a multiple of up to this many rows; a larger gap means a tokenizer of another model.
const MAX_PADDING_ROWS: usize = 512;

fn bad(reason: String) -> TextError {
    TextError::BadFile { file: TOKENIZER, reason }
}

/// As the `ByteLevel` decoder of `tokenizers`: a piece with a character outside the alphabet stands for itself.
fn piece_bytes(piece: &str) -> Vec<u8> {
    piece.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| piece.as_bytes().to_vec())
}

/// GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other 68 bytes, in order, are U+0100 to U+0143.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The character that stands for a byte.
    fn character_of(byte: u8) -> char {
        (0x21..=0x143)
            .filter_map(char::from_u32)
            .find(|&character| byte_of(character) == Some(byte))
            .unwrap_or('\0')
    }

    #[test]
    fn every_byte_has_one_character_of_the_alphabet() {
        let alphabet: std::collections::BTreeSet<char> = (0..=255).map(character_of).collect();
        assert_eq!(alphabet.len(), 256);
        for byte in 0..=255 {
            assert_eq!(byte_of(character_of(byte)), Some(byte));
        }
        for (byte, character) in
            [(b' ', 'Ġ'), (b'\n', 'Ċ'), (b'\t', 'ĉ'), (0x7F, 'ġ'), (0xA0, 'ł'), (0xAD, 'Ń')]
        {
            assert_eq!(character_of(byte), character, "{byte:#x}");
        }
    }
}
