//! What nodes have, where the operator may know. It is told in conditions and decides nothing.

use herd_control::gang::{Gang, TroubleKind};
use herd_control::room::Room;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client};

/// Nodes read at once: one is some 20 KiB.
const PAGE: u32 = 100;
/// Of a cluster that has more, the first ones are enough for a hint.
const MAX_PAGES: usize = 50;

/// Says of gangs that no node can hold what they lack. Nodes are read only where one waits for devices.
pub(crate) async fn explain(client: &Client, gangs: &mut [Gang]) {
    let waits = |gang: &Gang| {
        let for_a_node = gang.trouble.as_ref().is_some_and(|trouble| trouble.kind == TroubleKind::Scheduling);
        for_a_node && gang.pods.iter().any(|pod| pod.need.is_some())
    };
    if !gangs.iter().any(waits) {
        return;
    }
    match room(client).await {
        Ok(room) => room.explain(gangs),
        // It was not given the right to: the scheduler's words have to do.
        Err(kube::Error::Api(status)) if status.is_forbidden() => {}
        Err(error) => tracing::warn!("failed to list nodes: {error}"),
    }
}

async fn room(client: &Client) -> Result<Room, kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let mut room = Room::default();
    let mut page = ListParams::default().limit(PAGE);
    for _ in 0..MAX_PAGES {
        let listed = nodes.list(&page).await?;
        listed.items.iter().for_each(|node| room.add(node));
        match listed.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => break,
        }
    }
    Ok(room)
}
