//! The front door: gRPC and OpenAI HTTP in, token ids to the gangs, text out.
//!
//! Both doors feed one pipeline and encode its events:
//! `request -> ValidatedGeneration -> choices (a Decode stream each) -> events (token-aligned text)`.

mod admission;
mod best_of;
mod choice;
mod error;
mod event;
mod fleet;
mod gateway;
mod generation;
mod grpc;
mod http1;
mod metrics;
mod observe;
mod openai;
mod options;
mod page;
mod ports;
mod request;
mod request_id;
mod task;
mod transcript;
mod validate;

pub use error::RequestError;
pub use fleet::{Discovery, FixedFleet, FleetSnapshot, GangEndpoint, KubernetesError, KubernetesFleet};
pub use gateway::{Gateway, GatewayError};
pub use options::{Addresses, GatewayOptions, Limits};
pub use page::{FleetReport, GangReport, LastScale, ModelReport, Quantiles};
pub use ports::{PortError, ReservedPort};
pub use validate::MAX_LOGPROBS;
