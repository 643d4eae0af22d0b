//! Candidates of one lease in simulated time, over a network that delays and loses requests and answers.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// One attempt of a candidate, and what becomes of it. Times are in milliseconds.
#[derive(Clone, Debug)]
struct Round {
    /// Before it begins, after the one before ended.
    pause: u64,
    /// Of the read's request and answer, between them and the write, of the write's request and answer.
    delays: [u64; 5],
    /// Which of the four messages is lost, if any.
    lost: Option<usize>,
    /// Gives the lease back if it leads, rather than renew it.
    release: bool,
}

fn round() -> impl Strategy<Value = Round> {
    let delay = || prop_oneof![4 => 0..200_u64, 1 => 0..20_000_u64];
    let pause = prop_oneof![4 => 0..3_000_u64, 1 => 0..40_000_u64];
    let lost = prop_oneof![6 => Just(None), 1 => (0..4_usize).prop_map(Some)];
    (pause, [delay(), delay(), delay(), delay(), delay()], lost, prop::bool::weighted(0.1))
        .prop_map(|(pause, delays, lost, release)| Round { pause, delays, lost, release })
}

/// What happens next in a round.
enum Phase {
    Begins,
    ReadArrives,
    ReadAnswered { seen: Option<LeaseSpec>, version: u64 },
    Writes { version: u64, release: bool },
    WriteArrives { claim: LeaseSpec, version: u64, sent: Instant, release: bool },
    WriteAnswered { written: LeaseSpec, sent: Instant, release: bool },
}

struct Member {
    election: Election,
    /// Its clocks, which agree with nobody's.
    epoch: Instant,
    wall: i64,
    leads_until: Option<Instant>,
    rounds: std::vec::IntoIter<Round>,
    round: Round,
}

impl Member {
    fn new(index: usize, rounds: Vec<Round>, epoch: Instant) -> Self {
        Self {
            election: Election::new(format!("m{index}"), Timing::default()),
            epoch: epoch + Duration::from_secs(1_000 * index as u64),
            wall: [-900_000_000_000, 0, 900_000_000_000][index % 3],
            leads_until: None,
            rounds: rounds.into_iter(),
            round: Round { pause: 0, delays: [0; 5], lost: None, release: false },
        }
    }

    fn leads(&self, time: u64) -> bool {
        self.leads_until.is_some_and(|until| self.epoch + Duration::from_millis(time) < until)
    }

    fn next_round(&mut self) -> Option<(u64, Phase)> {
        self.round = self.rounds.next()?;
        Some((self.round.pause, Phase::Begins))
    }
}

/// The lease at the API server.
#[derive(Default)]
struct Store {
    spec: Option<LeaseSpec>,
    version: u64,
}

/// Takes a member's round one step on. Returns the next one and when it is due; `None` ends the round.
fn step(member: &mut Member, store: &mut Store, time: u64, phase: Phase) -> Option<(u64, Phase)> {
    let Round { pause: _, delays, lost, release } = member.round.clone();
    let local = member.epoch + Duration::from_millis(time);
    let sends = |message: usize| lost != Some(message);
    match phase {
        Phase::Begins if release && member.leads(time) => {
            member.leads_until = None;
            Some((delays[0] + delays[1], Phase::Writes { version: store.version, release: true }))
        }
        Phase::Begins => sends(0).then_some((delays[0], Phase::ReadArrives)),
        Phase::ReadArrives => {
            let seen = Phase::ReadAnswered { seen: store.spec.clone(), version: store.version };
            sends(1).then_some((delays[1], seen))
        }
        Phase::ReadAnswered { seen, version } => {
            member.election.observe(seen.as_ref(), local);
            let waits = matches!(member.election.verdict(local), Verdict::Wait { .. });
            (!waits).then_some((delays[2], Phase::Writes { version, release: false }))
        }
        Phase::Writes { version, release } => {
            let wall = Timestamp::from_millisecond(member.wall + time as i64).unwrap();
            let claim = member.election.claim(wall);
            let claim = if release { released(&claim, wall) } else { claim };
            sends(2).then_some((delays[3], Phase::WriteArrives { claim, version, sent: local, release }))
        }
        Phase::WriteArrives { claim, version, sent, release } => {
            if version != store.version {
                return None;
            }
            *store = Store { spec: Some(claim.clone()), version: version + 1 };
            sends(3).then_some((delays[4], Phase::WriteAnswered { written: claim, sent, release }))
        }
        Phase::WriteAnswered { written, sent, release } => {
            member.election.observe(Some(&written), local);
            if !release {
                member.leads_until = Some(member.election.timing().leads_until(sent));
            }
            None
        }
    }
}

/// Runs all rounds. Returns who led when, in order; fails if two lead at once.
fn run(scripts: Vec<Vec<Round>>) -> Result<Vec<(u64, usize)>, TestCaseError> {
    let epoch = Instant::now();
    let mut members: Vec<Member> =
        scripts.into_iter().enumerate().map(|(index, rounds)| Member::new(index, rounds, epoch)).collect();
    let (mut store, mut led, mut sequence) = (Store::default(), Vec::new(), 0_u64);
    let mut due: BTreeMap<(u64, u64), (usize, Phase)> = BTreeMap::new();
    let mut schedule = |due: &mut BTreeMap<_, _>, time, index, phase| {
        sequence += 1;
        due.insert((time, sequence), (index, phase));
    };
    for (index, member) in members.iter_mut().enumerate() {
        if let Some((pause, phase)) = member.next_round() {
            schedule(&mut due, pause, index, phase);
        }
    }
    while let Some(((time, _), (index, phase))) = due.pop_first() {
        let next = step(&mut members[index], &mut store, time, phase);
        let leaders: Vec<_> = (0..members.len()).filter(|index| members[*index].leads(time)).collect();
        prop_assert!(leaders.len() <= 1, "at {time} ms {leaders:?} lead");
        led.extend(leaders.first().map(|leader| (time, *leader)));
        if let Some((delay, phase)) = next.or_else(|| members[index].next_round()) {
            schedule(&mut due, time + delay, index, phase);
        }
    }
    Ok(led)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn two_never_lead_at_once(scripts in vec(vec(round(), 1..24), 2..4)) {
        run(scripts)?;
    }

    #[test]
    fn a_dead_leader_is_replaced(renewals in 1..10_usize, later in 0..2_000_u64, delay in 0..500_u64) {
        let round = |pause| Round { pause, delays: [delay; 5], lost: None, release: false };
        let mut dies = vec![round(0)];
        dies.extend(vec![round(2_000); renewals]);
        let mut waits = vec![round(5 * delay + 1 + later)];
        waits.extend(vec![round(2_000); 40]);
        let written = (renewals as u64) * 2_000 + (renewals as u64 + 1) * 5 * delay;
        let led = run(vec![dies, waits])?;
        let replaced = led.iter().find(|(_, index)| *index == 1).map(|(time, _)| *time);
        // The last record may be seen a round after it was written, and seen to be old a round after it expired.
        let latest = written + 15_000 + 2 * (2_000 + 5 * delay);
        prop_assert!(replaced.is_some_and(|time| time <= latest), "{replaced:?}, not by {latest}");
        prop_assert!(led.iter().any(|(_, index)| *index == 0));
    }
}
