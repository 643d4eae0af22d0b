//! Structured output: a grammar compiled against a model's vocabulary, as the [`herd_engine::Constraint`] that keeps a choice to
//! it. The engine knows token ids and no tokenizer, the gateway no llguidance: so this is a crate of its own, and the worker's.
//!
//! A grammar comes from a client. Its size, the time and memory of compiling it and of every step under it are bounded, and
//! what cannot be used is a [`GrammarError`]. The state under a grammar is a function of the grammar and the tokens so far:
//! choices share nothing that one of them could fill up.

mod compiler;
mod constraint;
mod error;
mod grammar;

pub use compiler::{Compiled, Compiler};
pub use constraint::GrammarConstraint;
pub use error::GrammarError;
pub use grammar::{Grammar, MAX_GRAMMAR_BYTES};
