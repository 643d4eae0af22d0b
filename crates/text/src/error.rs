//! What can be wrong: with a model's files, or with a request.

/// A model whose text files cannot be used, or a request whose text cannot. [`TextError::field`] tells them apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A file that every model needs.
    #[error("the model has no {0}")]
    MissingFile(&'static str),
    /// A file larger than this crate reads.
    #[error("{file} has {bytes} bytes; at most {limit} are read")]
    FileTooLarge {
        /// Which.
        file: &'static str,
        /// Its size.
        bytes: usize,
        /// The most that is read.
        limit: usize,
    },
    /// A file that cannot be parsed or contradicts itself.
    #[error("{file} is not usable: {reason}")]
    BadFile {
        /// Which.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A tokenizer of a kind that is not served.
    #[error(
        "tokenizer.json has {what}; only byte-level BPE is served (model BPE, pre-tokenizer and decoder ByteLevel)"
    )]
    UnsupportedTokenizer {
        /// What it has instead.
        what: String,
    },
    /// The tokenizer belongs to another model.
    #[error(
        "tokenizer.json has ids up to {largest_id} and config.json a vocab_size of {vocab_size}: they are not of one model"
    )]
    VocabularySize {
        /// The largest id in the tokenizer.
        largest_id: usize,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The chat template does not compile, or makes control tokens in a way that cannot be told from a user's text.
    #[error("the chat template is not usable: {0}")]
    BadTemplate(String),
    /// A chat request to a model without a chat template.
    #[error("the model has no chat template: messages cannot be used; send a prompt to /v1/completions")]
    NoChatTemplate,
    /// A chat of no messages.
    #[error("messages is empty: at least one message is needed")]
    NoMessages,
    /// A role that the templates do not know.
    #[error("messages[{index}].role is {role:?}; it must be one of system, developer, user, assistant")]
    BadRole {
        /// Of the message.
        index: usize,
        /// What was sent, cut to a readable length.
        role: String,
    },
    /// The template refused these messages, or failed on them.
    #[error("messages cannot be rendered by the model's chat template: {0}")]
    Render(String),
    /// The rendered chat is too long to tokenize.
    #[error("messages are too long: they render to more than {limit} bytes of text")]
    RenderedTooLarge {
        /// [`crate::MAX_RENDERED_BYTES`].
        limit: usize,
    },
    /// Stop strings that cannot be used.
    #[error("{0}")]
    BadStop(String),
    /// Text that the tokenizer cannot represent.
    #[error("{field} cannot be tokenized: {reason}")]
    Encode {
        /// `prompt` or `messages`.
        field: &'static str,
        /// Why.
        reason: String,
    },
}

impl TextError {
    /// The request field at fault, or `None` where the model's files are.
    pub fn field(&self) -> Option<String> {
        match self {
            Self::MissingFile(_)
            | Self::FileTooLarge { .. }
            | Self::BadFile { .. }
            | Self::UnsupportedTokenizer { .. }
            | Self::VocabularySize { .. }
            | Self::BadTemplate(_) => None,
            Self::BadRole { index, .. } => Some(format!("messages[{index}].role")),
            Self::NoChatTemplate | Self::NoMessages | Self::Render(_) | Self::RenderedTooLarge { .. } => {
                Some("messages".to_owned())
            }
            Self::BadStop(_) => Some("stop".to_owned()),
            Self::Encode { field, .. } => Some((*field).to_owned()),
        }
    }
}
