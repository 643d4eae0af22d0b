//! Decisions and what they were made from, so that they can be made again.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::decide::{Decision, decide};
use super::history::History;
use super::input::Input;

/// One decision, and what it was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// What was known.
    pub input: Input,
    /// What followed.
    pub decision: Decision,
}

/// The decisions about one deployment, the oldest first, as they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Recording {
    /// What was remembered before the first of them.
    pub before: History,
    /// The decisions.
    pub entries: VecDeque<Entry>,
}

/// A decision that is not made again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("decision {index} is another one now")]
pub struct Mismatch {
    /// Which, from 0.
    pub index: usize,
    /// What is decided now.
    pub now: Box<Decision>,
}

impl Recording {
    /// Makes all decisions again.
    pub fn replay(&self) -> Result<(), Mismatch> {
        let mut history = self.before.clone();
        for (index, Entry { input, decision }) in self.entries.iter().enumerate() {
            let (now, after) = decide(input, &history);
            if now != *decision {
                return Err(Mismatch { index, now: Box::new(now) });
            }
            history = after;
        }
        Ok(())
    }
}

/// Decides about one deployment, and keeps the last decisions.
#[derive(Clone, Debug, Default)]
pub struct Log {
    recording: Recording,
    history: History,
    weight: usize,
}

impl Log {
    /// The next decision.
    pub fn decide(&mut self, input: Input) -> Decision {
        let (decision, history) = decide(&input, &self.history);
        self.history = history;
        let entry = Entry { input, decision: decision.clone() };
        self.weight += entry.weight();
        self.recording.entries.push_back(entry);
        decision
    }

    /// Drops the oldest entry; what it left behind is kept.
    pub fn forget_oldest(&mut self) {
        if let Some(entry) = self.recording.entries.pop_front() {
            self.weight -= entry.weight();
            self.recording.before = decide(&entry.input, &self.recording.before).1;
        }
    }

    /// Entries kept.
    pub fn len(&self) -> usize {
        self.recording.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.recording.entries.is_empty()
    }

    /// What all of them take, in pools and gangs.
    pub fn weight(&self) -> usize {
        self.weight
    }

    /// All that is kept.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }
}

impl Entry {
    fn weight(&self) -> usize {
        1 + self.input.pools.iter().map(|pool| 1 + pool.gangs.len()).sum::<usize>()
    }
}
