//! Sockets that are bound long before they listen: a taken port is told at once, and nobody connects before the fleet is up.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket};

/// An address of our own on which nobody can connect yet.
#[derive(Debug)]
pub struct ReservedPort {
    socket: TcpSocket,
    address: SocketAddr,
}

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}")]
pub struct PortError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Connections the kernel queues for us.
const BACKLOG: u32 = 1024;

impl ReservedPort {
    /// Binds; port 0 takes a free one.
    pub fn reserve(address: SocketAddr) -> Result<Self, PortError> {
        let bind = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            // Without it a restart would wait for the last connections' TIME_WAIT.
            socket.set_reuseaddr(true)?;
            socket.set_nodelay(true)?;
            socket.bind(address)?;
            let address = socket.local_addr()?;
            Ok(Self { socket, address })
        };
        bind().map_err(|source| PortError { address, source })
    }

    /// With the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn listen(self) -> Result<TcpListener, PortError> {
        let address = self.address;
        self.socket.listen(BACKLOG).map_err(|source| PortError { address, source })
    }
}
