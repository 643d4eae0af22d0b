//! From a checkpoint to tokens: reads each rank's slices, runs step plans on a backend, samples. Knows neither Kubernetes
//! nor gRPC; KV leaves and enters through [`KvStore`] reads and writes that the worker moves over its own sockets.

mod executor;
mod kv;
mod request;

pub use executor::{Executor, ExecutorError, StepOutput};
pub use kv::{KvError, KvSlab, KvStore};
pub use request::{Event, FinishReason, SampledToken, Sampling, TokenLogprob};
