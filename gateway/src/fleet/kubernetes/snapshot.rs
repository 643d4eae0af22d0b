//! From the cluster's objects to the fleet: a pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use herd_api::{labels, ports};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use kube::ResourceExt;
use kube::core::PartialObjectMeta;
use tracing::warn;

use crate::fleet::{FleetSnapshot, GangEndpoint};

/// Gangs that are followed, each over a connection of its own.
const MAX_GANGS: usize = 4096;
/// Services whose names are served.
const MAX_SERVICES: usize = 4096;
/// Names of one Service, and bytes of one of them: more than the custom resource allows.
const MAX_NAMES: usize = 64;
const MAX_NAME_BYTES: usize = 512;
/// On an `EndpointSlice`: the Service it is of.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What was found, and what of it cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) snapshot: FleetSnapshot,
    pub(super) problems: Problems,
}

/// What is left out, for the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Problems {
    /// Services by "namespace/name".
    pub(super) unnamed: BTreeMap<String, NamesError>,
    pub(super) services_over: usize,
    pub(super) gangs_over: usize,
}

/// A Service whose served names cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NamesError {
    #[error("it has none")]
    Missing,
    #[error("they are no JSON array of strings: {0}")]
    Json(String),
    #[error("they are {0}; 1 to {MAX_NAMES} are allowed")]
    Count(usize),
    #[error("one has {0} bytes; 1 to {MAX_NAME_BYTES} are allowed")]
    Length(usize),
}

impl Problems {
    pub(super) fn tell(&self) {
        let Self { unnamed, services_over, gangs_over } = self;
        for (service, error) in unnamed {
            warn!(service, %error, "ignored a Service and its gangs: no use of its {}", labels::SERVED_NAMES);
        }
        if *services_over > 0 {
            warn!("ignored {services_over} Services beyond the first {MAX_SERVICES}");
        }
        if *gangs_over > 0 {
            warn!("ignored {gangs_over} gangs beyond the first {MAX_GANGS}");
        }
    }
}

/// The names of all Services, and the gangs that their slices hold: ready ones, and the others apart. What cannot be used
/// leaves out itself and nothing else; so does what is beyond the bounds.
pub(super) fn snapshot<'a>(
    services: impl IntoIterator<Item = &'a PartialObjectMeta<Service>>,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
) -> Found {
    let mut problems = Problems::default();
    let mut services: BTreeMap<(String, String), _> = services
        .into_iter()
        .map(|service| ((service.namespace().unwrap_or_default(), service.name_any()), service))
        .collect();
    while services.len() > MAX_SERVICES {
        services.pop_last();
        problems.services_over += 1;
    }
    let mut names: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for (key, service) in services {
        match served_names(service) {
            Ok(served) => drop(names.insert(key, served)),
            Err(error) => drop(problems.unnamed.insert(format!("{}/{}", key.0, key.1), error)),
        }
    }
    let mut leaders: BTreeMap<SocketAddr, Leader<'_>> = BTreeMap::new();
    for slice in slices {
        let Some(service) = slice.labels().get(SERVICE_NAME) else { continue };
        let key = (slice.namespace().unwrap_or_default(), service.clone());
        let Some(served) = names.get(&key) else { continue };
        for (address, ready) in endpoints(slice) {
            let leader = leaders.entry(address).or_default();
            leader.ready |= ready;
            leader.names.extend(served);
        }
    }
    while leaders.len() > MAX_GANGS {
        leaders.pop_last();
        problems.gangs_over += 1;
    }
    let (mut gangs, mut doubted) = (Vec::new(), Vec::new());
    for (address, Leader { names, ready }) in leaders {
        let models = names.into_iter().cloned().collect();
        let gang = GangEndpoint { models, leader: address.to_string() };
        if ready { gangs.push(gang) } else { doubted.push(gang) }
    }
    let models = names.into_values().flatten().collect();
    Found { snapshot: FleetSnapshot { models, gangs, doubted }, problems }
}

/// What all slices say of an address.
#[derive(Default)]
struct Leader<'a> {
    names: BTreeSet<&'a String>,
    ready: bool,
}

fn served_names(service: &PartialObjectMeta<Service>) -> Result<BTreeSet<String>, NamesError> {
    let text = service.annotations().get(labels::SERVED_NAMES).ok_or(NamesError::Missing)?;
    let names: Vec<String> =
        serde_json::from_str(text).map_err(|error| NamesError::Json(error.to_string()))?;
    if names.is_empty() || names.len() > MAX_NAMES {
        return Err(NamesError::Count(names.len()));
    }
    if let Some(name) = names.iter().find(|name| name.is_empty() || name.len() > MAX_NAME_BYTES) {
        return Err(NamesError::Length(name.len()));
    }
    Ok(names.into_iter().collect())
}

/// Where the leaders of a slice are called, and whether they are ready.
fn endpoints(slice: &EndpointSlice) -> impl Iterator<Item = (SocketAddr, bool)> {
    let port = slice.ports.iter().flatten().find_map(grpc_port);
    slice.endpoints.iter().flatten().filter_map(move |endpoint| {
        // Of an endpoint's addresses only the first one means anything.
        let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        Some((SocketAddr::new(address, port?), is_ready(endpoint)))
    })
}

fn grpc_port(port: &EndpointPort) -> Option<u16> {
    if port.name.as_deref() != Some(ports::GRPC_NAME) {
        return None;
    }
    u16::try_from(port.port?).ok().filter(|port| *port > 0)
}

/// One that is terminating never is.
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
}

#[cfg(test)]
mod tests;
