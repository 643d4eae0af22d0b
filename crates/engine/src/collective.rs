//! What the ranks of a gang give each other: sums and maxima over the ranks of a stage, hidden states from stage to stage.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use herd_model::Parallelism;

/// How far ranks may be apart before the slower ones are given up.
const SKEW_DEADLINE: Duration = Duration::from_mins(2);

/// What a stage is ahead of the next one at most: values given and not taken.
pub const GIVEN_AHEAD: usize = 8;

/// One rank's end of its gang. The ranks of a stage call the same operations in the same order with slices of the same length;
/// a reduction returns when all have called, with the same result on every rank, to the bit.
pub trait Collective: Send + Sync {
    /// This rank, counted from 0 over all stages.
    fn rank(&self) -> usize;

    /// Replaces `values` by the element-wise sum over the ranks of the stage, added in rank order.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Replaces `values` by the element-wise maximum over the ranks of the stage.
    fn all_reduce_max(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Gives `values`, the same on every rank of the stage, to the next stage. Waits only where [`GIVEN_AHEAD`] are not taken
    /// yet.
    fn give_next(&self, values: &[f32]) -> Result<(), CollectiveError>;

    /// What the stage before gave, in the order in which it was given.
    fn take_previous(&self) -> Result<Arc<[f32]>, CollectiveError>;

    /// Ends the gang: every operation under way or to come fails on all ranks.
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

/// What the ranks of a gang that are threads of this process give each other, and how they reach those of other processes.
/// They block while they wait.
pub struct LocalRank {
    rank: usize,
    gang: Arc<Gang>,
}

/// The ranks of the gang that live in other processes. All processes hold equally many ranks in a row, of one stage.
pub trait Remote: Send + Sync {
    /// Sends what each rank of this process gives, in rank order, to the other processes of its stage, whose ranks are
    /// `stage`, and hands each of their ranks' to `take`. Called for one operation after the other, by one thread at a time.
    fn exchange(
        &self,
        stage: &Range<usize>,
        own: &[&[f32]],
        take: &mut dyn FnMut(usize, Vec<f32>),
    ) -> Result<(), CollectiveError>;

    /// Gives `values` to the process that has this rank of the next stage.
    fn give(&self, rank: usize, values: &[f32]) -> Result<(), CollectiveError>;

    /// What the process that has this rank of the stage before gives next.
    fn take(&self, rank: usize) -> Result<Vec<f32>, CollectiveError>;

    /// Ends the gang in the other processes too: what is under way or to come fails.
    fn abort(&self, reason: &str);
}

struct Gang {
    tensor: usize,
    stages: Vec<Stage>,
    remote: Option<Arc<dyn Remote>>,
}

struct Stage {
    ranks: Range<usize>,
    /// Those of this process.
    local: Range<usize>,
    /// By rank of the stage. Two sets, used in turns: when a rank writes to one, every rank of this process has left the
    /// operation that last used it.
    slots: [Vec<RwLock<Vec<f32>>>; 2],
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    arrived: usize,
    /// Reductions that all ranks have entered.
    operations: usize,
    /// From the stage before, and how many local ranks have not taken it.
    given: VecDeque<(Arc<[f32]>, usize)>,
    /// How much of what was given each local rank has taken: of all, and of what is in `given`.
    taken: Vec<usize>,
    aborted: Option<CollectiveError>,
}

impl Stage {
    fn new(ranks: Range<usize>, here: &Range<usize>) -> Self {
        let local = ranks.start.max(here.start)..ranks.end.min(here.end).max(ranks.start.max(here.start));
        let slots = || ranks.clone().map(|_| RwLock::default()).collect();
        let state = State { taken: vec![0; local.len()], ..State::default() };
        Self { slots: [slots(), slots()], ranks, local, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until `done`, or until the gang is over, which is an error.
    fn wait_until<'a>(
        &self,
        state: MutexGuard<'a, State>,
        rank: usize,
        done: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, CollectiveError> {
        let waiting = |state: &mut State| !done(state) && state.aborted.is_none();
        let waited = self.changed.wait_timeout_while(state, SKEW_DEADLINE, waiting);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && waiting(&mut state) {
            let reason = format!("no answer of the other ranks within {} s", SKEW_DEADLINE.as_secs());
            state.aborted = Some(CollectiveError::Aborted { rank, reason });
            self.changed.notify_all();
        }
        state.aborted.clone().map_or(Ok(state), Err)
    }

    /// Gives its ranks here what the stage before has computed.
    fn give(&self, rank: usize, values: Arc<[f32]>) -> Result<(), CollectiveError> {
        let mut state = self.wait_until(self.lock(), rank, |state| state.given.len() < GIVEN_AHEAD)?;
        state.given.push_back((values, self.local.len()));
        self.changed.notify_all();
        Ok(())
    }

    fn take(&self, rank: usize) -> Result<Arc<[f32]>, CollectiveError> {
        let number = rank - self.local.start;
        let mut state =
            self.wait_until(self.lock(), rank, |state| state.taken[number] < state.given.len())?;
        let State { given, taken, .. } = &mut *state;
        let (values, left) = &mut given[taken[number]];
        let values = Arc::clone(values);
        *left -= 1;
        let is_last = *left == 0;
        taken[number] += 1;
        // Taken in order: what all have taken stands in front.
        if is_last {
            given.pop_front();
            for taken in taken {
                *taken -= 1;
            }
            self.changed.notify_all();
        }
        Ok(values)
    }

    fn abort(&self, error: &CollectiveError) {
        self.lock().aborted.get_or_insert_with(|| error.clone());
        self.changed.notify_all();
    }

    fn exchange(&self, remote: &dyn Remote, operation: usize) -> Result<(), CollectiveError> {
        let slots = &self.slots[operation % 2];
        let own: Vec<_> = slots[self.local.start - self.ranks.start..self.local.end - self.ranks.start]
            .iter()
            .map(|slot| slot.read().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let own: Vec<&[f32]> = own.iter().map(|values| values.as_slice()).collect();
        remote.exchange(&self.ranks, &own, &mut |rank, values| {
            // A rank of this process is nobody else's to speak for.
            let slot = rank.checked_sub(self.ranks.start).and_then(|number| slots.get(number));
            if let Some(slot) = slot.filter(|_| !self.local.contains(&rank)) {
                *slot.write().unwrap_or_else(PoisonError::into_inner) = values;
            }
        })
    }
}

impl LocalRank {
    /// A new gang, all in this process, by rank.
    pub fn gang(parallelism: Parallelism) -> Vec<Self> {
        Self::part(0..parallelism.ranks(), parallelism, None)
    }

    /// The ranks `local` of a gang, by rank. The others are reached by `remote`.
    pub fn part(local: Range<usize>, parallelism: Parallelism, remote: Option<Arc<dyn Remote>>) -> Vec<Self> {
        let Parallelism { tensor, pipeline } = parallelism;
        let stages = (0..pipeline).map(|stage| Stage::new(stage * tensor..(stage + 1) * tensor, &local));
        let gang = Arc::new(Gang { tensor, stages: stages.collect(), remote });
        local.map(|rank| Self { rank, gang: Arc::clone(&gang) }).collect()
    }

    fn stage(&self) -> &Stage {
        &self.gang.stages[self.rank / self.gang.tensor]
    }

    /// Shows `values` to the other ranks of the stage, waits for theirs, and calls `take` for each rank's, in rank order.
    fn exchange(
        &self,
        values: &[f32],
        mut take: impl FnMut(usize, &[f32]) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let stage = self.stage();
        let operation = stage.lock().operations;
        let slots = &stage.slots[operation % 2];
        {
            let own = &slots[self.rank - stage.ranks.start];
            let mut own = own.write().unwrap_or_else(PoisonError::into_inner);
            own.clear();
            own.extend_from_slice(values);
        }
        self.wait(stage, operation)?;
        for (rank, slot) in stage.ranks.clone().zip(slots) {
            take(rank, &slot.read().unwrap_or_else(PoisonError::into_inner))?;
        }
        Ok(())
    }

    /// Until all ranks of the stage are in the operation. The last of this process brings in those of the others.
    fn wait(&self, stage: &Stage, operation: usize) -> Result<(), CollectiveError> {
        let mut state = stage.lock();
        state.arrived += 1;
        if state.arrived == stage.local.len() {
            state.arrived = 0;
            let remote = self.gang.remote.as_ref().filter(|_| stage.local != stage.ranks);
            if let (Some(remote), None) = (remote, &state.aborted) {
                drop(state);
                let exchanged = stage.exchange(&**remote, operation);
                state = stage.lock();
                if let Err(error) = exchanged {
                    state.aborted.get_or_insert(error);
                }
            }
            state.operations += 1;
            stage.changed.notify_all();
        }
        stage.wait_until(state, self.rank, |state| state.operations > operation).map(drop)
    }

    fn all_reduce(
        &self,
        values: &mut [f32],
        combine: impl Fn(f32, f32) -> f32,
    ) -> Result<(), CollectiveError> {
        let tensor = self.gang.tensor;
        if tensor == 1 {
            return Ok(());
        }
        let own = values.to_vec();
        self.exchange(&own, |rank, given| {
            if given.len() != own.len() {
                return Err(CollectiveError::Mismatch { rank, given: given.len(), own: own.len() });
            }
            if rank.is_multiple_of(tensor) {
                values.copy_from_slice(given);
            } else {
                values.iter_mut().zip(given).for_each(|(value, given)| *value = combine(*value, *given));
            }
            Ok(())
        })
    }

    /// The stage of another rank, if that rank is in this process; else how it is reached, unless there is no such rank.
    fn reach(&self, rank: usize) -> Result<Result<&Stage, &dyn Remote>, CollectiveError> {
        let stage = self.gang.stages.get(rank / self.gang.tensor);
        match (stage, &self.gang.remote) {
            (Some(stage), _) if stage.local.contains(&rank) => Ok(Ok(stage)),
            (Some(_), Some(remote)) => Ok(Err(&**remote)),
            _ => {
                let reason = format!("there is no rank {rank} to reach");
                Err(CollectiveError::Aborted { rank: self.rank, reason })
            }
        }
    }
}

impl Collective for LocalRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.all_reduce(values, |sum, value| sum + value)
    }

    fn all_reduce_max(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.all_reduce(values, f32::max)
    }

    fn give_next(&self, values: &[f32]) -> Result<(), CollectiveError> {
        // One speaks for all ranks of the stage that are here.
        if self.rank != self.stage().local.start {
            return Ok(());
        }
        let next = self.rank + self.gang.tensor;
        match self.reach(next)? {
            Ok(stage) => stage.give(self.rank, values.into()),
            Err(remote) => remote.give(next, values),
        }
    }

    fn take_previous(&self) -> Result<Arc<[f32]>, CollectiveError> {
        let stage = self.stage();
        let previous = self.rank.checked_sub(self.gang.tensor).unwrap_or(usize::MAX);
        if self.rank == stage.local.start
            && let Err(remote) = self.reach(previous)?
        {
            stage.give(self.rank, remote.take(previous)?.into())?;
        }
        stage.take(self.rank)
    }

    fn abort(&self, reason: &str) {
        let aborted = CollectiveError::Aborted { rank: self.rank, reason: reason.to_owned() };
        self.gang.stages.iter().for_each(|stage| stage.abort(&aborted));
        if let Some(remote) = &self.gang.remote {
            remote.abort(reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn on_each<T: Send>(size: usize, run: impl Fn(LocalRank) -> T + Sync) -> Vec<T> {
        on_each_of(Parallelism::tensor(size), run)
    }

    fn on_each_of<T: Send>(parallelism: Parallelism, run: impl Fn(LocalRank) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let ranks: Vec<_> = LocalRank::gang(parallelism)
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

    #[test]
    fn stages_hand_on_in_order_and_reduce_apart() {
        const TURNS: usize = 5 * GIVEN_AHEAD;
        let ends = on_each_of(Parallelism { tensor: 2, pipeline: 3 }, |end| {
            let stage = end.rank() / 2;
            (0..TURNS)
                .map(|turn| {
                    let mut values =
                        if stage == 0 { vec![turn as f32] } else { end.take_previous().unwrap().to_vec() };
                    // 1 from each rank of the stage.
                    let mut sum = [1.0];
                    end.all_reduce_sum(&mut sum).unwrap();
                    values[0] += sum[0];
                    if stage < 2 {
                        end.give_next(&values).unwrap();
                    }
                    values[0]
                })
                .collect::<Vec<_>>()
        });
        for (rank, values) in ends.iter().enumerate() {
            let expected = (0..TURNS).map(|turn| (turn + 2 * (rank / 2 + 1)) as f32);
            assert_eq!(*values, expected.collect::<Vec<_>>(), "rank {rank}");
        }
    }

    #[test]
    fn a_stage_is_not_ahead_without_bound() {
        let ends = LocalRank::gang(Parallelism { tensor: 1, pipeline: 2 });
        for turn in 0..GIVEN_AHEAD {
            ends[0].give_next(&[turn as f32]).unwrap();
        }
        thread::scope(|scope| {
            let more = scope.spawn(|| ends[0].give_next(&[-1.0]));
            ends[1].abort("out of memory");
            assert!(more.join().unwrap().is_err());
        });
        assert!(ends[1].take_previous().is_err());
    }

    #[test]
    fn a_rank_that_fails_ends_the_other_stages_too() {
        let results = on_each_of(Parallelism { tensor: 1, pipeline: 3 }, |end| {
            if end.rank() == 0 {
                end.abort("out of memory");
                return Ok(());
            }
            end.take_previous().map(drop)
        });
        let aborted = CollectiveError::Aborted { rank: 0, reason: "out of memory".to_owned() };
        assert_eq!(results[1..], [Err(aborted.clone()), Err(aborted)]);
    }
}
