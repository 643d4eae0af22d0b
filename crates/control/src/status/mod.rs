//! What has become of an object, in the words that people and `kubectl wait` read.

mod deployment;
mod notes;
mod pool;

pub use deployment::{DeploymentView, ScalingView, deployment_status};
pub use notes::{Note, notes};
pub use pool::{PoolView, pool_status};

/// "1 gang", "2 gangs".
fn gangs(count: i32) -> String {
    if count == 1 { "1 gang".to_owned() } else { format!("{count} gangs") }
}
