//! Response streams and the tasks behind them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::drain::{Admission, Ticket};

/// Messages a client may be behind before the task waits for it; tokens that come meanwhile are joined to one message.
const MESSAGES: usize = 16;

/// Where a task's messages go. An error means that nobody listens any more.
#[derive(Debug)]
pub(crate) struct Messages<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Messages<T> {
    pub(crate) async fn send(&self, message: T) -> Result<(), Status> {
        self.0.send(Ok(message)).await.map_err(|_| Status::cancelled("the caller is gone"))
    }
}

/// A response stream fed by a task that it owns: when the stream is dropped, which is the only sign of a client that went
/// away, the task is aborted where it waits and drops all it holds.
#[derive(Debug)]
pub(crate) struct TaskStream<T> {
    messages: mpsc::Receiver<Result<T, Status>>,
    _task: JoinSet<()>,
}

impl<T: Send + 'static> TaskStream<T> {
    /// Runs `work` as long as the stream lives, the caller waits and the gang does not abort it. Its error is the stream's
    /// last message; the ticket is given back before that.
    pub(crate) fn spawn<F>(
        admission: &Arc<Admission>,
        ticket: Ticket,
        deadline: Option<Instant>,
        work: impl FnOnce(Messages<T>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), Status>> + Send,
    {
        let (sender, messages) = mpsc::channel(MESSAGES);
        let admission = Arc::clone(admission);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let ended = tokio::select! {
                biased;
                status = admission.aborted() => Err(status),
                () = passed(deadline) => Err(Status::deadline_exceeded("the caller's deadline has passed")),
                ended = work(Messages(sender.clone())) => ended,
            };
            drop(ticket);
            if let Err(status) = ended {
                // A client that is gone hears nothing.
                let _ = sender.send(Err(status)).await;
            }
        });
        Self { messages, _task: task }
    }
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

impl<T> Stream for TaskStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.messages.poll_recv(context)
    }
}
