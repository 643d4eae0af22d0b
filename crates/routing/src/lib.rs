//! Which gangs take a request: pure functions over a snapshot of the fleet. No clock, no socket, no lock.

mod pick;
mod view;

pub use pick::{Refusal, Route, pick};
pub use view::{GangView, Phase, Role, TOKENS_A_REQUEST};
