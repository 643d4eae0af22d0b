//! Every socket of the worker is made here, so that TLS will be one place.

mod kv;
mod listen;
mod peers;

pub(crate) use kv::{connect_rank, serve_kv};
pub(crate) use listen::{advertised, bind, serve_grpc, serve_http};
pub(crate) use peers::{Peers, leader};

use std::time::Duration;

/// For a TCP handshake within a cluster, where a healthy peer takes milliseconds and a lost packet is sent again after one
/// second and after three.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Idle time after which the other end of a gRPC connection is asked whether it is there, and the time it has to answer: a
/// host that vanishes without a word is noticed within twice this.
const KEEPALIVE: Duration = Duration::from_secs(10);
