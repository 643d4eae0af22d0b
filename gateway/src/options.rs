//! What a gateway is started with.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::Discovery;
use crate::ports::ReservedPort;

/// Where a gateway listens and whom it serves.
pub struct GatewayOptions {
    /// Finds the gangs.
    pub discovery: Arc<dyn Discovery>,
    /// OpenAI HTTP, health and metrics.
    pub http: ReservedPort,
    /// gRPC.
    pub grpc: ReservedPort,
    /// `Some`: the ports open only when every gang found is Ready, and starting fails when that takes longer. `None`: they
    /// open at once, and a request for a model without a Ready gang is refused.
    pub ready_within: Option<Duration>,
    /// Bounds.
    pub limits: Limits,
}

impl GatewayOptions {
    /// Default bounds, ports open at once.
    pub fn new(discovery: Arc<dyn Discovery>, http: ReservedPort, grpc: ReservedPort) -> Self {
        Self { discovery, http, grpc, ready_within: None, limits: Limits::default() }
    }
}

/// Bounds of one gateway. Every queue, wait and message has one.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests in work at once, over both front doors.
    pub concurrent_requests: usize,
    /// Connections of each front door.
    pub connections: usize,
    /// Bytes of a request.
    pub body_bytes: usize,
    /// For the body of a request to arrive.
    pub body_timeout: Duration,
    /// For the head of an HTTP request to arrive, from when its connection could have sent it: so idle connections are closed
    /// after this long too.
    pub header_timeout: Duration,
    /// Longest time a request may take; a shorter `grpc-timeout` counts.
    pub request_deadline: Duration,
    /// Longest time a client may leave the answer unread once buffers are full.
    pub slow_client: Duration,
    /// Choices of one request: prompts times n.
    pub choices: usize,
    /// Events between the gangs and the encoder of one request.
    pub buffered_events: usize,
    /// Tokenizing jobs at once.
    pub tokenizing: usize,
    /// For a gang to come where a model has none that is ready, before a choice's first token; zero: refuse at once. A model
    /// whose gangs are full is not waited for.
    pub gang_wait: Duration,
    /// Times a choice is tried before its first token.
    pub attempts: u32,
    /// Times a choice that has begun is tried elsewhere, from where it is.
    pub resumes: u32,
    /// For a gang to come that goes on with a choice which has begun; its client waits in the middle of a text.
    pub resume_wait: Duration,
    /// Requests a gang may have beyond its batch before it counts as full.
    pub queue_per_gang: u32,
    /// For requests to end once the gateway drains.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            concurrent_requests: 1024,
            connections: 4096,
            body_bytes: 4 << 20,
            body_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(30),
            request_deadline: Duration::from_mins(15),
            slow_client: Duration::from_mins(1),
            choices: 128,
            buffered_events: 64,
            tokenizing: std::thread::available_parallelism().map_or(2, usize::from),
            gang_wait: Duration::ZERO,
            attempts: 3,
            resumes: 32,
            resume_wait: Duration::from_mins(5),
            queue_per_gang: 256,
            drain: Duration::from_secs(30),
        }
    }
}

/// Addresses a running gateway listens on.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// OpenAI HTTP.
    pub http: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
}
