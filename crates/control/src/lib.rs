//! Pure: what a LlamaDeployment should become, and what has become of it. No client, no clock, no randomness: what is
//! observed, the time and fresh ids come in as arguments.
//!
//! `observe -> validate -> plan -> build -> apply -> status`: all but observe and apply are here.

pub mod autoscale;
pub mod build;
mod duration;
pub mod gang;
mod owner;
pub mod plan;
mod resolve;
pub mod revision;
pub mod room;
pub mod status;
#[cfg(test)]
mod tests;
mod validate;

pub use duration::duration;
pub use owner::check_owner;
pub use resolve::Resolution;
pub use validate::{
    Claims, GangSpec, Gpu, Refusal, ValidatedDeployment, ValidatedPool, ValidatedScaling, validate,
};
