//! TCP connections that KV frames travel on.

use std::io;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::CONNECT_DEADLINE;

/// Connections a rank takes at once; one more waits in the backlog. A transfer has one or a few to each rank.
const MAX_KV_CONNECTIONS: usize = 1024;

/// After an `accept` that failed, mostly for want of file descriptors: trying again at once would fail as well.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Connects to a rank, of this gang or another one.
pub(crate) async fn connect_rank(endpoint: &str) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT_DEADLINE, TcpStream::connect(endpoint)).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_DEADLINE:?}"))
    })??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Takes connections for ever, each in a task of its own. All end when the future is dropped.
pub(crate) async fn serve_kv<F>(listener: TcpListener, handle: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_KV_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                // Acknowledgements are small and waited for. A connection that is already broken fails at its first read.
                let _ = stream.set_nodelay(true);
                let connection = handle(stream);
                connections.spawn(async move {
                    connection.await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "kv connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
