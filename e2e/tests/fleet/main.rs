//! The fleet on a real Kubernetes, driven as its users drive it. `cargo xtask e2e` runs them.

mod admission;
mod changes;
mod clients;
mod deletion;
mod gangs;
mod objects;
mod observed;
mod operator;
mod rights;
mod scaling;
mod shared;
mod sources;
mod status;
