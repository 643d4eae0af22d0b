//! A model's text side: everything built once from its files and shared by its requests.

use std::time::SystemTime;

use crate::bundle::{CONFIG, GENERATION_CONFIG};
use crate::chat::{ChatTemplate, Message, Segment};
use crate::tokenizer::{ParsedTokenizer, PlainTokenizer};
use crate::vocabulary::Vocabulary;
use crate::{BundleFiles, TextError, tokenizer};

/// Tokenizer, chat template and end-of-sequence ids of one model.
pub struct TextModel {
    plain: PlainTokenizer,
    vocabulary: Vocabulary,
    pub(crate) chat: Option<ChatTemplate>,
    bos: Option<u32>,
    stop_ids: Vec<u32>,
}

impl TextModel {
    /// Checks the files against each other and builds everything; hundreds of milliseconds for a vocabulary of 128,256.
    pub fn from_files(files: &BundleFiles) -> Result<Self, TextError> {
        let config = files.config()?;
        let generation_config = files.generation_config()?;
        let tokenizer_config = files.tokenizer_config()?;
        let ParsedTokenizer { plain, vocabulary, added, first } =
            tokenizer::parse(files.tokenizer()?, config.vocab_size)?;

        let bos = match tokenizer_config.add_bos_token {
            Some(true) => tokenizer_config.bos().and_then(|text| vocabulary.control_id(text)),
            Some(false) => None,
            None => first,
        };
        let (file, ids) = match generation_config.eos_token_id {
            Some(ids) => (GENERATION_CONFIG, ids.into_vec()),
            None => (CONFIG, config.eos_token_id.map(crate::bundle::Ids::into_vec).unwrap_or_default()),
        };
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary.size()) {
            let reason = format!("eos_token_id {id} is outside the vocabulary of {}", vocabulary.size());
            return Err(TextError::BadFile { file, reason });
        }
        let mut stop_ids = ids;
        stop_ids.extend(tokenizer_config.eos().and_then(|text| vocabulary.control_id(text)));
        stop_ids.sort_unstable();
        stop_ids.dedup();

        let chat = match files.chat_template(&tokenizer_config)? {
            Some(source) => Some(ChatTemplate::new(&source, tokenizer_config.named_tokens(), &added)?),
            None => None,
        };
        Ok(Self { plain, vocabulary, chat, bos, stop_ids })
    }

    /// The ids of `text`, of which no part becomes a control token. `add_bos` puts the beginning-of-sequence token in front
    /// if the model's tokenizer does so for a prompt.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        ids.extend(self.bos.filter(|_| add_bos));
        self.plain.encode(text, "prompt", &mut ids)?;
        Ok(ids)
    }

    /// The ids of a chat in the model's own template, up to where the assistant's answer begins. `now` is what a template
    /// that states the date states, in UTC.
    pub fn render_chat(&self, messages: &[Message], now: SystemTime) -> Result<Vec<u32>, TextError> {
        let chat = self.chat.as_ref().ok_or(TextError::NoChatTemplate)?;
        self.encode_segments(&chat.render_messages(messages, now)?)
    }

    /// Whether [`TextModel::render_chat`] can be used.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// A token alone, for log probabilities: its text, with U+FFFD for parts of characters, and its exact bytes. A control
    /// token has its name; an id without a token has neither.
    pub fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.vocabulary.bytes(id);
        (String::from_utf8_lossy(bytes).into_owned(), bytes.to_vec())
    }

    /// Ids that end a sequence, in order.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Whether the token controls the conversation rather than being part of it.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_control(id)
    }

    /// Bytes of the longest token: a text of more than `n` times as many has more than `n` tokens.
    pub fn longest_token(&self) -> usize {
        self.vocabulary.longest()
    }

    /// Rows of the embedding: every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.size()
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    pub(crate) fn encode_segments(&self, segments: &[Segment]) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for segment in segments {
            match segment {
                Segment::Control(id) => ids.push(*id),
                Segment::Text(text) => self.plain.encode(text, "messages", &mut ids)?,
            }
        }
        Ok(ids)
    }
}
