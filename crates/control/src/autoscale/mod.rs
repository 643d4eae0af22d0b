//! How many gangs each pool should have, from what Prometheus knows of those there are.
//!
//! [`decide`] is a function of an [`Input`] and a [`History`], both plain data, so that a [`Log`] of inputs leads to the same
//! decisions again. All numbers of an input are integers: they are the same after they were written and read.

mod availability;
mod budget;
mod decide;
mod history;
mod input;
mod load;
mod log;
#[cfg(test)]
mod tests;

pub use decide::{Decision, Metrics, PoolDecision, decide};
pub use history::{Falling, History, PoolHistory, Rising, SeenGang, Throughput};
pub use input::{GangInput, Input, Policy, PoolInput, Reading, Sample};
pub use log::{Entry, Log, Mismatch, Recording};
