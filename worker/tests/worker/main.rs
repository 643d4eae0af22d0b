//! Workers over loopback.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is how a test fails")]

mod binary;
mod cache;
mod cpu;
mod cuda;
mod descriptors;
mod drain;
mod fencing;
mod gangs;
mod metrics;
mod proxy;
mod ranks;
mod split;
mod stub;
mod unified;
