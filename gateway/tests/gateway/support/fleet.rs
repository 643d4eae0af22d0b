//! Real workers in this process, on the fake backend or on the CPU one.

use herd_engine::{FakeControl, FakeOptions, Isa};
use herd_model::{Dtype, Parallelism};
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{Load, WatchRequest};
use herd_worker::{Backend, CpuBackend, FakeBackend, KvSize, Role, Worker, WorkerLimits, WorkerOptions};

use super::{Running, fixture, gateway, http, soon};

/// A gateway in front of workers of its own.
pub(crate) struct Fleet {
    pub(crate) running: Running,
    pub(crate) workers: Vec<Worker>,
    /// Of each fake worker.
    pub(crate) controls: Vec<FakeControl>,
}

/// A worker a role on the fake backend, with the tiny model's text.
pub(crate) async fn fake(roles: &[Role]) -> Fleet {
    fake_with(roles, WorkerLimits::default()).await
}

pub(crate) async fn fake_with(roles: &[Role], limits: WorkerLimits) -> Fleet {
    let mut workers = Vec::new();
    let mut controls = Vec::new();
    for &role in roles {
        let options =
            FakeOptions { vocab_size: 1024, unlikely: (1015..1024).collect(), ..FakeOptions::default() };
        let backend = FakeBackend::new(options, 4096).with_bundle(fixture("tiny-llama31/tiny-llama31-bf16"));
        controls.push(backend.control());
        let options =
            WorkerOptions { role, limits, ..WorkerOptions::loopback(Backend::Fake(Box::new(backend))) };
        workers.push(Worker::start(options).await.unwrap());
    }
    Fleet { running: front(&workers).await, workers, controls }
}

/// A worker a role on a fixture's weights, in f32.
pub(crate) async fn cpu(model: &str, tensor: usize, roles: &[Role]) -> Fleet {
    let mut workers = Vec::new();
    for &role in roles {
        let backend = CpuBackend {
            model_dir: fixture(model),
            parallelism: Parallelism::tensor(tensor),
            dtype: Dtype::F32,
            kv: KvSize::Blocks(64),
            threads: tensor,
            isa: Isa::detect(),
        };
        let options = WorkerOptions { role, ..WorkerOptions::loopback(Backend::Cpu(backend)) };
        workers.push(Worker::start(options).await.unwrap());
    }
    Fleet { running: front(&workers).await, workers, controls: Vec::new() }
}

async fn front(workers: &[Worker]) -> Running {
    let leaders: Vec<_> = workers.iter().map(|worker| worker.endpoint().to_string()).collect();
    gateway(&leaders).await
}

/// A worker that is dropped waits for its step, also where a test fails while it is held.
impl Drop for Fleet {
    fn drop(&mut self) {
        self.controls.iter().for_each(FakeControl::open);
    }
}

impl Fleet {
    /// Waits until a worker reports a load like this.
    pub(crate) async fn load(&self, worker: usize, like: impl Fn(&Load) -> bool) {
        let endpoint = format!("http://{}", self.workers[worker].endpoint());
        let mut client = WorkerClient::connect(endpoint).await.unwrap();
        let mut events = client.watch(WatchRequest {}).await.unwrap().into_inner();
        loop {
            let event = soon(events.message()).await.unwrap().unwrap();
            if like(&event.load.unwrap()) {
                return;
            }
        }
    }

    /// The sum of a metric over all workers.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let mut sum = None;
        for worker in &self.workers {
            let text = http::get(worker.http(), "/metrics").await.text();
            let values = text.lines().filter_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
            sum = values.fold(sum, |sum, value| Some(sum.unwrap_or(0.0) + value));
        }
        sum.unwrap_or_else(|| panic!("no worker has {name}"))
    }
}
