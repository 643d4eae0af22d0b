//! What to do next, from what is wanted and what is observed. Nothing remembers a step: the next one follows from what is.

mod backoff;
mod deployment;
mod pin;
mod pool;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use backoff::failure;
pub use deployment::{DeploymentPlan, ObservedDeployment, PlannedPool, PlannedRevision, plan_deployment};
pub use pin::{PlannedResolver, Unresolved};
pub use pool::{Deletion, ObservedPool, PoolPlan, plan_pool};
