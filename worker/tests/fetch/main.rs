//! Downloads from servers that speak the protocols of a hub and of buckets, and from what networks make of them.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "this is how a test fails")]

mod bucket;
mod bucket_source;
mod disk;
mod hub;
mod hub_source;
mod model;
mod server;
mod sharing;
