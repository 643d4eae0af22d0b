//! The gateway of a cluster whose addresses are not reached from here.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::ask::Gateway;
use crate::kubectl::Kubectl;
use crate::release::{GRPC, HTTP, NAMESPACE};
use crate::stream::{self, Stream};

/// How long kubectl has until it forwards.
const WITHIN: Duration = Duration::from_secs(30);

/// `kubectl port-forward`, which ends with this.
pub(crate) struct Forward {
    _kubectl: Stream<String>,
    gateway: Gateway,
}

impl Forward {
    pub(crate) fn start(kubectl: &Kubectl) -> Result<Self> {
        // Ports of this machine that are free.
        let (http, grpc) = (format!(":{HTTP}"), format!(":{GRPC}"));
        let arguments =
            ["-n", NAMESPACE, "port-forward", "--address=127.0.0.1", "service/herd-gateway", &http, &grpc];
        let mut lines = Stream::start(kubectl.command(&arguments), WITHIN, stream::lines)?;
        let mut next = || loop {
            let line = lines.next().context("kubectl port-forward said nothing")?;
            let line = line.context("kubectl port-forward ended")?;
            if let Some(address) = forwarded(&line) {
                return anyhow::Ok(address);
            }
        };
        // In the order they were asked for.
        let gateway = Gateway { http: next()?, grpc: next()? };
        Ok(Self { _kubectl: lines, gateway })
    }

    pub(crate) fn gateway(&self) -> Gateway {
        self.gateway
    }
}

/// `Forwarding from 127.0.0.1:40123 -> 8080`
fn forwarded(line: &str) -> Option<SocketAddr> {
    let (address, _) = line.strip_prefix("Forwarding from ")?.split_once(" -> ")?;
    address.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_where_it_listens() {
        assert_eq!(
            forwarded("Forwarding from 127.0.0.1:40123 -> 8080"),
            Some(SocketAddr::from(([127, 0, 0, 1], 40123)))
        );
        for other in ["Handling connection for 40123", "Forwarding from here -> 8080", ""] {
            assert_eq!(forwarded(other), None, "{other}");
        }
    }
}
