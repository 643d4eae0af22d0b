//! Text on the gateway's side: tokenizer, chat templates, stop strings, UTF-8 streaming. Pure: files come in as bytes, the
//! time as an argument.
//!
//! One rule shapes the crate: **text from a user never becomes a control token**. [`TextModel::encode`] knows no control
//! tokens at all, and in [`TextModel::render_chat`] only the literals that stand in the model's own template (or come from
//! its `bos_token` and the like) become control tokens, whatever a message contains and whatever the template does to it.
//!
//! Ids come back as text through [`OutputStream`]: ids, bytes, UTF-8 and stop strings in one pipeline.

mod bundle;
mod chat;
mod error;
mod model;
mod stop;
mod stream;
mod tokenizer;
mod utf8;
mod vocabulary;

#[cfg(test)]
#[path = "../tests/reference/mod.rs"]
mod reference;

pub use bundle::{BUNDLE_FILE_NAMES, BundleFiles};
pub use chat::{MAX_RENDERED_BYTES, Message, ROLES};
pub use error::TextError;
pub use model::TextModel;
pub use stop::{MAX_STOP_BYTES, MAX_STOPS, Stops};
pub use stream::{OutputStream, Piece};
pub use vocabulary::Vocabulary;
