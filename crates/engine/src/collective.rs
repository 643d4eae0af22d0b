//! What the ranks of a gang compute together: sums and maxima over all of them.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// How far ranks may be apart before the slower ones are given up.
const SKEW_DEADLINE: Duration = Duration::from_mins(2);

/// One rank's end of the group. Every rank calls the same operations in the same order with slices of the same length; each
/// returns when all have called. The result is the same on every rank, to the bit.
pub trait Collective: Send + Sync {
    /// This rank, counted from 0.
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn size(&self) -> usize;

    /// Replaces `values` by the element-wise sum over the ranks, added in rank order.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Replaces `values` by the element-wise maximum over the ranks.
    fn all_reduce_max(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Ends the group: every operation under way or to come fails on all ranks.
    fn abort(&self, reason: &str);
}

/// The group is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank gave up.
    #[error("rank {rank} ended the group: {reason}")]
    Aborted {
        /// Which one.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// Ranks disagree about what is being computed.
    #[error("rank {rank} gave {given} values where this rank gave {own}")]
    Mismatch {
        /// The other one.
        rank: usize,
        /// Its number of values.
        given: usize,
        /// This rank's.
        own: usize,
    },
}

/// What the ranks of a group that are threads of this process give each other, and how they reach those of other processes.
/// They block while they wait.
pub struct LocalRank {
    rank: usize,
    group: Arc<Group>,
}

/// The ranks of the group that live in other processes.
pub trait Remote: Send + Sync {
    /// Sends what each rank of this process gives, in rank order, to the other processes, and hands each of their ranks' to
    /// `take`. Called for one operation after the other, by one thread at a time.
    fn exchange(&self, own: &[&[f32]], take: &mut dyn FnMut(usize, Vec<f32>)) -> Result<(), CollectiveError>;

    /// Ends the group in the other processes too: an exchange under way or to come fails.
    fn abort(&self, reason: &str);
}

struct Group {
    /// Those of this process.
    local: Range<usize>,
    remote: Option<Arc<dyn Remote>>,
    /// By rank of the whole group. Two sets, used in turns: when a rank writes to one, every rank of this process has left
    /// the operation that last used it.
    slots: [Vec<RwLock<Vec<f32>>>; 2],
    barrier: Mutex<Barrier>,
    passed: Condvar,
}

#[derive(Default)]
struct Barrier {
    arrived: usize,
    /// Operations that all ranks have entered.
    operations: usize,
    aborted: Option<CollectiveError>,
}

impl LocalRank {
    /// A new group, all in this process, by rank.
    pub fn group(size: usize) -> Vec<Self> {
        Self::part(0..size, size, None)
    }

    /// The ranks `local` of a group of `size`, by rank. The others are reached by `remote`.
    pub fn part(local: Range<usize>, size: usize, remote: Option<Arc<dyn Remote>>) -> Vec<Self> {
        let slots = || (0..size).map(|_| RwLock::default()).collect();
        let group = Arc::new(Group {
            local: local.clone(),
            remote,
            slots: [slots(), slots()],
            barrier: Mutex::default(),
            passed: Condvar::new(),
        });
        local.map(|rank| Self { rank, group: Arc::clone(&group) }).collect()
    }

    fn barrier(&self) -> MutexGuard<'_, Barrier> {
        self.group.barrier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows `values` to the other ranks, waits for theirs, and calls `take` for each rank's, in rank order.
    fn exchange(
        &self,
        values: &[f32],
        mut take: impl FnMut(usize, &[f32]) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let operation = self.barrier().operations;
        let slots = &self.group.slots[operation % 2];
        {
            let mut own = slots[self.rank].write().unwrap_or_else(PoisonError::into_inner);
            own.clear();
            own.extend_from_slice(values);
        }
        self.wait(operation)?;
        for (rank, slot) in slots.iter().enumerate() {
            take(rank, &slot.read().unwrap_or_else(PoisonError::into_inner))?;
        }
        Ok(())
    }

    /// Until all ranks of the group are in the operation. The last of this process brings in those of the others.
    fn wait(&self, operation: usize) -> Result<(), CollectiveError> {
        let mut barrier = self.barrier();
        barrier.arrived += 1;
        if barrier.arrived == self.group.local.len() {
            barrier.arrived = 0;
            if let (Some(remote), None) = (&self.group.remote, &barrier.aborted) {
                drop(barrier);
                let exchanged = self.group.exchange(&**remote, operation);
                barrier = self.barrier();
                if let Err(error) = exchanged {
                    barrier.aborted.get_or_insert(error);
                }
            }
            barrier.operations += 1;
            self.group.passed.notify_all();
        }
        let waiting = |barrier: &mut Barrier| barrier.operations == operation && barrier.aborted.is_none();
        let (mut barrier, timeout) = self
            .group
            .passed
            .wait_timeout_while(barrier, SKEW_DEADLINE, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && waiting(&mut barrier) {
            let reason = format!("no answer of the other ranks within {} s", SKEW_DEADLINE.as_secs());
            barrier.aborted = Some(CollectiveError::Aborted { rank: self.rank, reason });
            self.group.passed.notify_all();
        }
        barrier.aborted.clone().map_or(Ok(()), Err)
    }

    fn all_reduce(
        &self,
        values: &mut [f32],
        combine: impl Fn(f32, f32) -> f32,
    ) -> Result<(), CollectiveError> {
        if self.size() == 1 {
            return Ok(());
        }
        let own = values.to_vec();
        self.exchange(&own, |rank, given| {
            if given.len() != own.len() {
                return Err(CollectiveError::Mismatch { rank, given: given.len(), own: own.len() });
            }
            if rank == 0 {
                values.copy_from_slice(given);
            } else {
                values.iter_mut().zip(given).for_each(|(value, given)| *value = combine(*value, *given));
            }
            Ok(())
        })
    }
}

impl Group {
    fn exchange(&self, remote: &dyn Remote, operation: usize) -> Result<(), CollectiveError> {
        let slots = &self.slots[operation % 2];
        let own: Vec<_> = slots[self.local.clone()]
            .iter()
            .map(|slot| slot.read().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let own: Vec<&[f32]> = own.iter().map(|values| values.as_slice()).collect();
        remote.exchange(&own, &mut |rank, values| {
            // A rank of this process is nobody else's to speak for.
            if let Some(slot) = slots.get(rank).filter(|_| !self.local.contains(&rank)) {
                *slot.write().unwrap_or_else(PoisonError::into_inner) = values;
            }
        })
    }
}

impl Collective for LocalRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.slots[0].len()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.all_reduce(values, |sum, value| sum + value)
    }

    fn all_reduce_max(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.all_reduce(values, f32::max)
    }

    fn abort(&self, reason: &str) {
        let aborted = CollectiveError::Aborted { rank: self.rank, reason: reason.to_owned() };
        self.barrier().aborted.get_or_insert(aborted);
        self.group.passed.notify_all();
        if let Some(remote) = &self.group.remote {
            remote.abort(reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn on_each<T: Send>(size: usize, run: impl Fn(LocalRank) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let ranks: Vec<_> = LocalRank::group(size)
                .into_iter()
                .map(|end| {
                    let run = &run;
                    scope.spawn(move || run(end))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_run_in_rank_order_and_agree_on_every_rank() {
        // In f32 the order shows: (1e8 + -1e8) + 1 is 1, 1e8 + (-1e8 + 1) is 0.
        let given = [1e8_f32, -1e8, 1.0];
        for sums in on_each(3, |end| {
            (0..500)
                .map(|turn| {
                    let mut values = [given[end.rank()], turn as f32];
                    end.all_reduce_sum(&mut values).unwrap();
                    values
                })
                .collect::<Vec<_>>()
        }) {
            for (turn, sum) in sums.iter().enumerate() {
                assert_eq!(sum.map(f32::to_bits), [1.0, 3.0 * turn as f32].map(f32::to_bits));
            }
        }
    }

    #[test]
    fn maxima() {
        for maximum in on_each(4, |end| {
            let mut values = [end.rank() as f32, -1.0 - end.rank() as f32];
            end.all_reduce_max(&mut values).unwrap();
            values
        }) {
            assert_eq!(maximum.map(f32::to_bits), [3.0, -1.0].map(f32::to_bits));
        }
    }

    #[test]
    fn a_rank_that_fails_ends_it_for_all() {
        let results = on_each(3, |end| {
            if end.rank() == 1 {
                end.abort("out of memory");
            }
            end.all_reduce_sum(&mut [1.0])
        });
        let aborted = CollectiveError::Aborted { rank: 1, reason: "out of memory".to_owned() };
        assert_eq!(results, vec![Err(aborted); 3]);
    }

    #[test]
    fn lengths_that_differ_are_refused() {
        let results = on_each(2, |end| end.all_reduce_sum(&mut vec![1.0; end.rank() + 1]));
        assert!(results.iter().all(|result| matches!(result, Err(CollectiveError::Mismatch { .. }))));
    }
}
