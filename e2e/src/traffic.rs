//! Requests that go on and on while something else is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use herd_proto::v1::GenerateRequest;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::{Answer, Inference};

/// Streams that are asked for again as soon as they end, each compared with what it has to be.
#[derive(Debug)]
pub struct Traffic {
    runtime: Handle,
    streams: JoinSet<Result<()>>,
    ended: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Traffic {
    /// One stream at a time of each request.
    pub fn start(
        runtime: &Handle,
        inference: &Inference,
        requests: impl IntoIterator<Item = (GenerateRequest, Answer)>,
    ) -> Self {
        let (ended, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut streams = JoinSet::new();
        for (request, expected) in requests {
            let (inference, ended, stop) = (inference.clone(), Arc::clone(&ended), Arc::clone(&stop));
            let stream = async move {
                while !stop.load(Ordering::Relaxed) {
                    let answer = inference.ask(&request).await?;
                    ensure!(answer == expected, "{request:?} was answered {answer:?}, not {expected:?}");
                    ended.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            };
            streams.spawn_on(stream, runtime);
        }
        Self { runtime: runtime.clone(), streams, ended, stop }
    }

    /// Answers until now, each as it has to be; an error where one was not.
    pub fn answers(&mut self) -> Result<usize> {
        if let Some(ended) = self.streams.try_join_next() {
            ended.context("a stream's task")?.context("a stream is broken")?;
            bail!("a stream ended before it was told to");
        }
        Ok(self.ended.load(Ordering::Relaxed))
    }

    /// Lets those that run end; how many there were in all.
    pub fn finish(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.runtime.block_on(async {
            while let Some(ended) = self.streams.join_next().await {
                ended.context("a stream's task")?.context("a stream is broken")?;
            }
            Ok(self.ended.load(Ordering::Relaxed))
        })
    }
}
