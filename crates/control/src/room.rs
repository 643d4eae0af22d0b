//! What nodes have of the devices that pods ask for. The scheduler says that no node has enough; how many would be enough, and
//! how many there are, is what a person has to know.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::gang::{Gang, TroubleKind};

/// How many devices of each resource the best node has, in use or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room(BTreeMap<String, u64>);

/// Devices that a pod asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// "nvidia.com/gpu".
    pub resource: String,
    /// How many.
    pub count: u64,
}

impl Room {
    /// Counts one more node in.
    pub fn add(&mut self, node: &Node) {
        let has = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        for (resource, count) in has.into_iter().flatten().filter_map(devices) {
            let best = self.0.entry(resource.clone()).or_insert(0);
            *best = count.max(*best);
        }
    }

    /// Says of gangs that wait for a node that none is large enough, where none is. What the scheduler says stands behind it.
    pub fn explain(&self, gangs: &mut [Gang]) {
        for Gang { pods, trouble, .. } in gangs {
            let needs = pods.iter().find_map(|pod| pod.need.as_ref());
            let (Some(Need { resource, count }), Some(trouble)) = (needs, trouble) else { continue };
            let best = self.0.get(resource).copied().unwrap_or(0);
            if trouble.kind == TroubleKind::Scheduling && *count > best {
                trouble.message = format!(
                    "needs {count} {resource} on one node; the best node has {best} ({})",
                    trouble.message
                );
            }
        }
    }
}

impl Need {
    /// Of its worker, where it asks for any.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let container = pod.spec.as_ref()?.containers.first()?;
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        let (resource, count) = limits.iter().find_map(devices)?;
        Some(Self { resource: resource.clone(), count })
    }
}

/// Whole things that a vendor's name stands before: no memory, no processor time.
fn devices<'a>((resource, Quantity(count)): (&'a String, &Quantity)) -> Option<(&'a String, u64)> {
    let (vendor, _) = resource.split_once('/')?;
    let is_device = vendor != "kubernetes.io" && !vendor.ends_with(".kubernetes.io");
    count.parse().ok().filter(|_| is_device).map(|count| (resource, count))
}
