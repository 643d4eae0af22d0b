//! A choice's place on its gangs, counted for as long as it is held.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use herd_proto::internal::v1::worker_client::WorkerClient;
use tonic::transport::Channel;

use super::{InFlight, Lesson, Live, Shared};

/// A gang, as long as the gateway's connection to it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GangKey {
    leader: String,
    connection: u64,
}

impl GangKey {
    fn new((leader, live): (&String, &Live)) -> Self {
        Self { leader: leader.clone(), connection: live.connection }
    }

    pub(super) fn is(&self, leader: &str, connection: u64) -> bool {
        self.leader == leader && self.connection == connection
    }
}

/// The gangs picked for one choice.
pub(crate) struct Assignment {
    pub(crate) client: WorkerClient<Channel>,
    /// "host:port", empty where the called gang computes the prompt.
    pub(crate) prefill_peer: String,
    pub(crate) prefill_epoch: u64,
    pub(crate) revision: String,
    pub(crate) epoch: u64,
    called_key: GangKey,
    prefill_key: Option<GangKey>,
    shared: Arc<Shared>,
    called: Counted,
    prefill: Option<Counted>,
}

impl Assignment {
    pub(super) fn new(
        shared: &Arc<Shared>,
        (leader, live): (&String, &Live),
        prefill: Option<(&String, &Live)>,
        prompt_tokens: u32,
    ) -> Self {
        let (here, there) = if prefill.is_some() { (0, prompt_tokens) } else { (prompt_tokens, 0) };
        Self {
            client: live.client.clone(),
            prefill_peer: prefill.map(|(leader, _)| leader.clone()).unwrap_or_default(),
            prefill_epoch: prefill.map_or(0, |(_, live)| live.description.epoch),
            revision: live.description.revision.clone(),
            epoch: live.description.epoch,
            called_key: GangKey::new((leader, live)),
            prefill_key: prefill.map(GangKey::new),
            shared: Arc::clone(shared),
            called: Counted::new(&live.in_flight, here),
            prefill: prefill.map(|(_, live)| Counted::new(&live.in_flight, there)),
        }
    }

    /// The first token is here: the prompt is no work any more, and the gangs work.
    pub(crate) fn prompt_done(&mut self) {
        self.called.prompt_done();
        self.prefill = None;
        self.learned(Party::Called, Lesson::Works);
        self.learned(Party::Prefill, Lesson::Works);
    }

    /// Tells the fleet what this choice learned about one of its gangs.
    pub(crate) fn learned(&self, party: Party, lesson: Lesson) {
        match (party, &self.prefill_key) {
            (Party::Called, _) => self.shared.learned(&self.called_key.leader, self.epoch, lesson),
            (Party::Prefill, Some(key)) => self.shared.learned(&key.leader, self.prefill_epoch, lesson),
            (Party::Prefill, None) => {}
        }
    }

    /// Which gang that is.
    pub(crate) fn gang(&self, party: Party) -> GangKey {
        let prefill = self.prefill_key.as_ref().filter(|_| party == Party::Prefill);
        prefill.unwrap_or(&self.called_key).clone()
    }

    /// Whether one of these is part of it.
    pub(crate) fn is_one_of(&self, gangs: &[GangKey]) -> bool {
        gangs.contains(&self.called_key) || self.prefill_key.as_ref().is_some_and(|key| gangs.contains(key))
    }
}

/// One of a choice's gangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Party {
    /// The one that was called, and decodes.
    Called,
    /// The one that it lets compute the prompt.
    Prefill,
}

/// One request in flight on one gang.
struct Counted {
    in_flight: Arc<InFlight>,
    prompt_tokens: u64,
}

impl Counted {
    fn new(in_flight: &Arc<InFlight>, prompt_tokens: u32) -> Self {
        let prompt_tokens = u64::from(prompt_tokens);
        in_flight.requests.fetch_add(1, Ordering::Relaxed);
        in_flight.prompt_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
        Self { in_flight: Arc::clone(in_flight), prompt_tokens }
    }

    fn prompt_done(&mut self) {
        let tokens = std::mem::take(&mut self.prompt_tokens);
        self.in_flight.prompt_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.prompt_done();
        self.in_flight.requests.fetch_sub(1, Ordering::Relaxed);
    }
}
