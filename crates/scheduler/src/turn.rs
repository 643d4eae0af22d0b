//! Whose turn it is: priorities, and what keeps them from starving anyone.

use std::cmp::Reverse;

use crate::SequenceId;

/// Younger sequences that may start before the oldest one that waits for a step; then it is its turn, whatever its priority.
pub const MAX_PASSED_OVER: usize = 16;

/// Times a sequence may lose its blocks to others; after that it loses them only to older ones that waited too long as well.
pub const MAX_PREEMPTIONS: usize = 4;

/// How a request stands among others, and whose cache it may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// Higher first; of one priority, first come first served.
    pub priority: i32,
    /// Requests share KV with those of the same salt only.
    pub cache_salt: String,
}

/// A place in the order of turns; the smallest is served first and preempted last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Turn {
    /// False: has waited too long, so its priority counts no more.
    young: bool,
    priority: Reverse<i32>,
    /// In the order of arrival.
    pub(crate) id: SequenceId,
}

impl Turn {
    pub(crate) fn new(id: SequenceId, priority: i32) -> Self {
        Self { young: true, priority: Reverse(priority), id }
    }

    /// Before all that are not aged, among those by arrival.
    #[must_use]
    pub(crate) fn aged(self) -> Self {
        Self { young: false, priority: Reverse(0), id: self.id }
    }

    pub(crate) fn is_aged(self) -> bool {
        !self.young
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_aged_come_first_then_the_urgent_then_the_old() {
        let turn = |id, priority| Turn::new(SequenceId(id), priority);
        let mut turns = [turn(1, 0), turn(2, 5), turn(3, 5), turn(4, -1).aged(), turn(5, 9).aged()];
        turns.sort_unstable();
        assert_eq!(turns.map(|turn| turn.id.0), [4, 5, 2, 3, 1]);
    }
}
