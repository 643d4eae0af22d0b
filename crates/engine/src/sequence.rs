//! The handles a caller holds. Dropping any of them ends the work within one step and frees its blocks.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::inbox::Ticket;
use crate::{Event, SubmitError};

/// A request on its way: first in the queue, then running.
///
/// Events come in this order: [`Event::Started`] (not after [`crate::Engine::decode`], whose reservation told the blocks
/// already), [`Event::Computed`] after each step that computed prompt tokens and then [`Event::Prompt`] where it is asked for,
/// [`Event::Token`]s with rising positions (of one step, these first), and one [`Event::Finished`], [`Event::Failed`] or [`Event::Unsatisfiable`], after which there is
/// nothing.
///
/// The loop never waits for a reader: the channel has room for every event the sequence can emit. That bound is only a count:
/// the channel is a list of small chunks, allocated as events come and reused as they are read. So a reader that keeps up
/// costs one chunk, and one that sleeps holds what its own prompt and `max_tokens` bound.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) events: mpsc::Receiver<Event>,
    /// For what its drop does.
    pub(crate) _ticket: Ticket,
}

impl Sequence {
    /// The next event; `None` after the last one. Safe to cancel.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

/// A reservation that waits for its turn.
#[derive(Debug)]
pub struct Reserving {
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) ticket: Ticket,
}

impl Reserving {
    /// Waits until the blocks are set aside. Dropping the future gives up the place in the queue.
    pub async fn ready(self) -> Result<Reservation, SubmitError> {
        let Self { mut events, ticket } = self;
        match events.recv().await {
            Some(Event::Started { blocks }) => Ok(Reservation { blocks, ticket }),
            Some(Event::Failed(reason)) => Err(SubmitError::Stopped(reason)),
            Some(
                Event::Computed { .. }
                | Event::Prompt(_)
                | Event::Token(_)
                | Event::Finished(_)
                | Event::Unsatisfiable(_),
            )
            | None => Err(SubmitError::Stopped("the step loop is gone".to_owned())),
        }
    }
}

/// Blocks that are set aside, and a slot to run in, for a prompt whose KV is computed elsewhere.
#[derive(Debug)]
pub struct Reservation {
    blocks: Arc<[u32]>,
    pub(crate) ticket: Ticket,
}

impl Reservation {
    /// Block table; position `p` lies in `blocks[p / block_tokens]`. Covers the prompt and what is to be generated.
    pub fn blocks(&self) -> &Arc<[u32]> {
        &self.blocks
    }
}
