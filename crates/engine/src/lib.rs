//! From a checkpoint to tokens: reads each rank's slices, runs step plans on a backend, samples. Knows neither Kubernetes
//! nor gRPC; KV leaves and enters through [`KvStore`] reads and writes that the worker moves over its own sockets.

mod checkpoint;
mod clipped;
mod collective;
mod constraint;
pub mod convert;
mod cpu;
mod cuda;
mod draft;
mod engine;
mod executor;
mod exp;
mod fake;
mod inbox;
mod kv;
mod observer;
mod philox;
mod prompt_logprobs;
pub mod readers;
mod request;
mod sampler;
mod sequence;
mod shaping;
mod step_loop;

pub use checkpoint::{Checkpoint, CheckpointError, tensors_of_file};
pub use clipped::RowsClipped;
pub use collective::{Collective, CollectiveError, GIVEN_AHEAD, LocalRank, Remote};
pub use constraint::{Constraint, ConstraintError, TokenMask};
pub use cpu::{
    Columns, CpuModel, CpuRanks, Isa, LoadError, LoadOptions, ModelInfo, RunningRanks, UnknownIsa,
    peak_multiply_adds,
};
pub use cuda::{CudaDevice, CudaError, cuda_devices};
pub use draft::Drafter;
pub use engine::{Engine, SubmitError};
pub use executor::{Executor, ExecutorError, StepOutput};
pub use fake::{FakeControl, FakeModel, FakeOptions};
pub use herd_scheduler::{
    Counters as EngineCounters, DEFAULT_STEP_TOKENS, Limits as EngineLimits, Load as EngineLoad, Scheduling,
    TooLong,
};
pub use kv::{KvError, KvSlab, KvStore};
pub use observer::{Observer, StepDone};
pub use request::{Event, FinishReason, SampledToken, Sampling, TokenLogprob};
pub use sampler::{SampleError, sample};
pub use sequence::{Reservation, Reserving, Sequence};
pub use shaping::{History, Penalties, Shaping};
