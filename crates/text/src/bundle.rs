//! The files of a model that say how its text works, as they come from a model directory or over `GetBundle`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::TextError;

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
pub(crate) const CONFIG: &str = "config.json";

/// Every file this crate reads; `chat_template.jinja` and `generation_config.json` may be absent.
pub const BUNDLE_FILE_NAMES: [&str; 5] =
    [TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG, CONFIG];

/// Llama 3's has 9 MB, with its merges as pairs 17 MB.
const MAX_TOKENIZER_BYTES: usize = 64 << 20;
const MAX_CONFIG_BYTES: usize = 4 << 20;
pub(crate) const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// File name -> bytes. Names other than [`BUNDLE_FILE_NAMES`] are carried and ignored.
#[derive(Clone, Default)]
pub struct BundleFiles(BTreeMap<String, Vec<u8>>);

impl BundleFiles {
    /// Adds a file, or replaces it.
    pub fn insert(&mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.0.insert(name.into(), bytes.into());
    }

    /// The bytes of a file.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// The files, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    pub(crate) fn tokenizer(&self) -> Result<Value, TextError> {
        self.json(TOKENIZER, MAX_TOKENIZER_BYTES)?.ok_or(TextError::MissingFile(TOKENIZER))
    }

    pub(crate) fn tokenizer_config(&self) -> Result<TokenizerConfig, TextError> {
        self.json(TOKENIZER_CONFIG, MAX_CONFIG_BYTES)?.ok_or(TextError::MissingFile(TOKENIZER_CONFIG))
    }

    pub(crate) fn config(&self) -> Result<Config, TextError> {
        self.json(CONFIG, MAX_CONFIG_BYTES)?.ok_or(TextError::MissingFile(CONFIG))
    }

    pub(crate) fn generation_config(&self) -> Result<GenerationConfig, TextError> {
        Ok(self.json(GENERATION_CONFIG, MAX_CONFIG_BYTES)?.unwrap_or_default())
    }

    /// The file of its own first, as `transformers` has it.
    pub(crate) fn chat_template(&self, config: &TokenizerConfig) -> Result<Option<String>, TextError> {
        let (file, template) = match self.bytes(CHAT_TEMPLATE, MAX_TEMPLATE_BYTES)? {
            Some(bytes) => {
                let text = std::str::from_utf8(bytes)
                    .map_err(|error| TextError::BadFile { file: CHAT_TEMPLATE, reason: error.to_string() })?;
                (CHAT_TEMPLATE, Some(text))
            }
            None => (TOKENIZER_CONFIG, config.chat_template.as_ref().and_then(Templates::default)),
        };
        let Some(template) = template else { return Ok(None) };
        if template.len() > MAX_TEMPLATE_BYTES {
            return Err(TextError::FileTooLarge { file, bytes: template.len(), limit: MAX_TEMPLATE_BYTES });
        }
        Ok(Some(template.to_owned()))
    }

    fn bytes(&self, file: &'static str, limit: usize) -> Result<Option<&[u8]>, TextError> {
        match self.get(file) {
            Some(bytes) if bytes.len() > limit => {
                Err(TextError::FileTooLarge { file, bytes: bytes.len(), limit })
            }
            found => Ok(found),
        }
    }

    fn json<T: serde::de::DeserializeOwned>(
        &self,
        file: &'static str,
        limit: usize,
    ) -> Result<Option<T>, TextError> {
        let Some(bytes) = self.bytes(file, limit)? else { return Ok(None) };
        serde_json::from_slice(bytes)
            .map(Some)
            .map_err(|error| TextError::BadFile { file, reason: error.to_string() })
    }
}

impl<N: Into<String>, B: Into<Vec<u8>>> FromIterator<(N, B)> for BundleFiles {
    fn from_iter<I: IntoIterator<Item = (N, B)>>(files: I) -> Self {
        Self(files.into_iter().map(|(name, bytes)| (name.into(), bytes.into())).collect())
    }
}

/// What is read of `tokenizer_config.json`.
#[derive(Deserialize)]
pub(crate) struct TokenizerConfig {
    pub(crate) add_bos_token: Option<bool>,
    chat_template: Option<Templates>,
    bos_token: Option<NamedToken>,
    eos_token: Option<NamedToken>,
    unk_token: Option<NamedToken>,
    pad_token: Option<NamedToken>,
    sep_token: Option<NamedToken>,
    cls_token: Option<NamedToken>,
    mask_token: Option<NamedToken>,
}

impl TokenizerConfig {
    pub(crate) fn bos(&self) -> Option<&str> {
        self.bos_token.as_ref().map(NamedToken::text)
    }

    pub(crate) fn eos(&self) -> Option<&str> {
        self.eos_token.as_ref().map(NamedToken::text)
    }

    /// The variables that a chat template may use.
    pub(crate) fn named_tokens(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("unk_token", &self.unk_token),
            ("pad_token", &self.pad_token),
            ("sep_token", &self.sep_token),
            ("cls_token", &self.cls_token),
            ("mask_token", &self.mask_token),
        ]
        .into_iter()
        .filter_map(|(name, token)| token.as_ref().map(|token| (name, token.text())))
    }
}

/// A token by its text, or as `transformers` writes an `AddedToken`.
#[derive(Deserialize)]
#[serde(untagged)]
enum NamedToken {
    Text(String),
    Added { content: String },
}

impl NamedToken {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

/// One template, or several by name, of which `default` is the chat's.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn default(&self) -> Option<&str> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => templates
                .iter()
                .find(|template| template.name == "default")
                .map(|named| named.template.as_str()),
        }
    }
}

/// What is read of `config.json`.
#[derive(Deserialize)]
pub(crate) struct Config {
    pub(crate) vocab_size: usize,
    pub(crate) eos_token_id: Option<Ids>,
}

/// What is read of `generation_config.json`.
#[derive(Default, Deserialize)]
pub(crate) struct GenerationConfig {
    pub(crate) eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}
