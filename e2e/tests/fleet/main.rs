//! The fleet on a real Kubernetes, driven as its users drive it. `cargo xtask e2e` runs them.

mod admission;
mod autoscaling;
mod cache;
mod changes;
mod clients;
mod deletion;
mod gangs;
mod gpus;
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared with the tests of downloads, where they are all used"
)]
#[path = "../../../worker/tests/fetch/hub.rs"]
mod hub;
mod losses;
mod monitoring;
mod objects;
mod observed;
mod operator;
mod rights;
mod scaling;
#[allow(dead_code, clippy::unwrap_used, reason = "shared with the tests of downloads, as hub is")]
#[path = "../../../worker/tests/fetch/server.rs"]
mod server;
mod shared;
mod sources;
mod status;
