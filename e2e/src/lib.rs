//! What tests on a real Kubernetes are made of: the tools that users have, run with deadlines, and waits that say what they
//! saw when they give up.

mod answer;
mod command;
mod diagnosis;
mod environment;
mod fleet;
mod http;
mod inference;
mod kubectl;
mod namespace;
mod serve;
mod table;
mod traffic;
mod wait;

pub use answer::{Answer, Choice};
pub use command::{Finished, run};
pub use environment::Environment;
pub use fleet::{Fleet, with_fleet};
pub use http::{get, metric};
pub use inference::Inference;
pub use kubectl::Kubectl;
pub use namespace::Namespace;
pub use serve::Serve;
pub use table::Table;
pub use traffic::Traffic;
pub use wait::{Deadline, eventually};
