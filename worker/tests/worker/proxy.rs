//! A TCP proxy that does to a connection what networks do.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::gangs::soon;

/// What happens to one connection. Offsets count bytes from its start.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    None,
    /// One bit on its way to the server.
    FlipSent {
        bit: usize,
    },
    /// One bit on its way back.
    FlipReceived {
        bit: usize,
    },
    /// Closed both ways after so many bytes to the server.
    Cut {
        after: usize,
    },
    /// Nothing to the server passes after so many bytes.
    Stall {
        after: usize,
    },
}

pub(crate) struct Proxy {
    address: SocketAddr,
    target: Arc<OnceLock<SocketAddr>>,
    connections: watch::Receiver<usize>,
    /// Dropped, it closes every connection.
    _task: JoinSet<()>,
}

impl Proxy {
    /// Faults are for one connection each, in the order they are opened; what comes after them passes unharmed.
    pub(crate) async fn start(faults: impl IntoIterator<Item = Fault>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::<OnceLock<SocketAddr>>::default();
        let faults = Mutex::new(faults.into_iter().collect::<VecDeque<_>>());
        let (count, connections) = watch::channel(0);
        let mut task = JoinSet::new();
        let to = Arc::clone(&target);
        task.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let fault = faults.lock().unwrap().pop_front().unwrap_or(Fault::None);
                let server = TcpStream::connect(*to.get().unwrap()).await.unwrap();
                open.spawn(pass(client, server, fault));
                count.send_modify(|count| *count += 1);
            }
        });
        Self { address, target, connections, _task: task }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn forward_to(&self, target: SocketAddr) {
        self.target.set(target).unwrap();
    }

    /// Waits until so many connections have been opened.
    pub(crate) async fn opened(&mut self, connections: usize) {
        soon(self.connections.wait_for(|count| *count >= connections)).await.unwrap();
    }

    pub(crate) fn connections(&self) -> usize {
        *self.connections.borrow()
    }
}

async fn pass(client: TcpStream, server: TcpStream, fault: Fault) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let sent = async {
        let mut seen = 0;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let Ok(read @ 1..) = from_client.read(&mut buffer).await else { return };
            let mut chunk = &mut buffer[..read];
            match fault {
                Fault::FlipSent { bit } => flip(chunk, seen, bit),
                Fault::Cut { after } if seen + read > after => {
                    let _ = to_server.write_all(&chunk[..after - seen]).await;
                    return;
                }
                Fault::Stall { after } if seen + read > after => {
                    let left = after.saturating_sub(seen);
                    chunk = &mut chunk[..left];
                }
                _ => {}
            }
            seen += read;
            if to_server.write_all(chunk).await.is_err() {
                return;
            }
        }
    };
    let received = async {
        let mut seen = 0;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let Ok(read @ 1..) = from_server.read(&mut buffer).await else { return };
            if let Fault::FlipReceived { bit } = fault {
                flip(&mut buffer[..read], seen, bit);
            }
            seen += read;
            if to_client.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = sent => {}
        () = received => {}
    }
}

fn flip(chunk: &mut [u8], seen: usize, bit: usize) {
    if let Some(byte) = (bit / 8).checked_sub(seen).and_then(|at| chunk.get_mut(at)) {
        *byte ^= 1 << (bit % 8);
    }
}
