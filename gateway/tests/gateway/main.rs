//! The gateway over real sockets, in front of scripted workers and of real ones.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that panics has failed")]

mod best_of;
mod binary;
mod cancelling;
mod chat;
mod chromium;
mod completions;
mod golden;
mod grpc;
mod kubernetes;
mod metrics;
mod overload;
mod page;
mod prompts;
mod refusals;
mod routing;
mod stops;
mod streams;
mod structured;
mod support;
mod waiting;
mod workers;
