//! Where gangs are found.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::watch;

use crate::LastScale;

/// The gangs there are, as far as whoever runs them knows. What they are, they say themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FleetSnapshot {
    /// Every name there is, those that no gang serves at the moment included.
    pub models: BTreeSet<String>,
    /// Each leader once.
    pub gangs: Vec<GangEndpoint>,
    /// Leaders that are not called ready: they end their streams before they go, or their node is not heard of. One that was
    /// among the gangs before, and says itself that it is Ready, is asked where no other gang is left.
    pub doubted: Vec<GangEndpoint>,
}

impl From<Vec<GangEndpoint>> for FleetSnapshot {
    /// With the names that these gangs serve.
    fn from(gangs: Vec<GangEndpoint>) -> Self {
        let models = gangs.iter().flat_map(|gang| &gang.models).cloned().collect();
        Self { models, gangs, doubted: Vec::new() }
    }
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
    /// Always holds the newest snapshot; `None` until there is a first one.
    fn watch(&self) -> watch::Receiver<Option<FleetSnapshot>>;

    /// What an autoscaler decided last, by served name, where whoever runs the gangs has one.
    fn decisions(&self) -> Option<watch::Receiver<BTreeMap<String, LastScale>>> {
        None
    }
}

/// A fleet that is told, not found.
#[derive(Debug)]
pub struct FixedFleet(watch::Sender<Option<FleetSnapshot>>);

impl FixedFleet {
    /// These gangs, until told otherwise.
    pub fn new(gangs: Vec<GangEndpoint>) -> Self {
        Self(watch::Sender::new(Some(gangs.into())))
    }

    /// Other gangs from now on.
    pub fn set(&self, gangs: Vec<GangEndpoint>) {
        self.0.send_replace(Some(gangs.into()));
    }
}

impl Discovery for FixedFleet {
    fn watch(&self) -> watch::Receiver<Option<FleetSnapshot>> {
        self.0.subscribe()
    }
}
