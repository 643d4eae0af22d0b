//! Where gangs are found.

use tokio::sync::watch;

/// The gangs there are, as far as whoever runs them knows. What they are, they say themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FleetSnapshot {
    /// Each leader once.
    pub gangs: Vec<GangEndpoint>,
}

/// How to reach a gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GangEndpoint {
    /// Names under which clients ask for its model.
    pub models: Vec<String>,
    /// "host:port" of its leader.
    pub leader: String,
}

/// A source of [`FleetSnapshot`]s: `EndpointSlice`s in a cluster, a fixed list elsewhere.
pub trait Discovery: Send + Sync {
    /// Always holds the newest snapshot.
    fn watch(&self) -> watch::Receiver<FleetSnapshot>;
}

/// A fleet that is told, not found.
#[derive(Debug)]
pub struct FixedFleet(watch::Sender<FleetSnapshot>);

impl FixedFleet {
    /// These gangs, until told otherwise.
    pub fn new(gangs: Vec<GangEndpoint>) -> Self {
        Self(watch::Sender::new(FleetSnapshot { gangs }))
    }

    /// Other gangs from now on.
    pub fn set(&self, gangs: Vec<GangEndpoint>) {
        self.0.send_replace(FleetSnapshot { gangs });
    }
}

impl Discovery for FixedFleet {
    fn watch(&self) -> watch::Receiver<FleetSnapshot> {
        self.0.subscribe()
    }
}
