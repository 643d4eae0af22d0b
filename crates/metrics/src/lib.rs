//! Every metric of Herd, declared once: name, kind, unit, labels with all values they can have, and help.
//!
//! A process builds its [`Page`] from its declarations, and cannot start without having registered each of them;
//! `docs/metrics.md` is written from the same ones. Label values are either listed in the declaration or names of served
//! models, of which there are at most [`MAX_MODELS`]: nothing that clients send becomes a label.

mod alias;
mod buckets;
mod by_model;
mod check;
mod declaration;
mod document;
mod family;
pub mod gateway;
pub mod operator;
mod page;
pub mod process;
pub mod worker;

pub use alias::{Alias, AliasOf};
pub use by_model::{ByModel, MAX_MODELS, OTHER_MODELS};
pub use check::check_page;
pub use declaration::{Kind, Label, Metric, Values};
pub use document::document;
pub use family::Family;
pub use page::{Page, PageBuilder, PageError};
