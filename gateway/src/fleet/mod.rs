//! The fleet as this gateway sees it: one task a gang keeps an entry true, requests pick among the entries.

mod assignment;
mod bundle;
mod discovery;
mod gang;
mod kubernetes;
mod wait;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{Load, Phase as WirePhase, WatchEvent};
use herd_routing::{GangView, Phase, Refusal, Role, Route};
use herd_text::TextModel;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Channel;

pub(crate) use assignment::{Assignment, GangKey, Party};
use bundle::Bundles;
pub use discovery::{Discovery, FixedFleet, FleetSnapshot, GangEndpoint};
use gang::Description;
pub use kubernetes::{KubernetesError, KubernetesFleet};
pub(crate) use wait::NotChosen;

use crate::RequestError;
use crate::page::GangReport;
use crate::task::OwnedTask;

/// A gang that fails is avoided for this long, doubled with each failure in a row.
const FIRST_AVOID: Duration = Duration::from_millis(500);
const LAST_AVOID: Duration = Duration::from_secs(30);

/// The gangs of all models.
pub(crate) struct Fleet {
    shared: Arc<Shared>,
    _manager: OwnedTask,
}

/// A served model, as one request sees it.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) digest: String,
    pub(crate) context_length: u32,
    pub(crate) text: Arc<TextModel>,
}

/// A line of the list of models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedModel {
    pub(crate) name: String,
    /// Empty while no gang of it was ever reached.
    pub(crate) digest: String,
    pub(crate) context_length: u32,
    pub(crate) ready_gangs: u32,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    /// Rises with every change of the gangs there are, of a gang's phase or of its role.
    changed: watch::Sender<u64>,
    /// Requests and choices that wait for such a change.
    waiting: Arc<wait::Waiting>,
    pub(crate) bundles: Bundles,
    queue_per_gang: u32,
}

#[derive(Default)]
struct State {
    /// Every name there is; `None` until discovery has spoken.
    models: Option<BTreeSet<String>>,
    gangs: BTreeMap<String, Gang>,
    /// Connections made so far, which numbers them.
    connections: u64,
    /// Requests routed so far; makes equal gangs take turns.
    turn: u64,
}

struct Gang {
    names: Vec<String>,
    /// Whoever finds gangs does not call it ready.
    doubted: bool,
    live: Option<Live>,
    /// Why its last connection ended or did not come about; `None` once there is one.
    fault: Option<Fault>,
}

/// What is wrong with a gang.
struct Fault {
    reason: String,
    /// Trying again does not help.
    permanent: bool,
}

/// A gang that was reached.
struct Live {
    description: Description,
    /// Its number: a gang that was connected to again may be given a request that failed before.
    connection: u64,
    text: Arc<TextModel>,
    client: WorkerClient<Channel>,
    role: Role,
    phase: Phase,
    load: Load,
    /// Requests in flight of this epoch: a gang that starts anew starts at zero, and late ends of the old epoch's requests
    /// do not count against it.
    in_flight: Arc<InFlight>,
    failures: u32,
    avoid_until: Option<Instant>,
}

#[derive(Debug, Default)]
struct InFlight {
    requests: AtomicU32,
    prompt_tokens: AtomicU64,
}

impl Fleet {
    /// Follows `discovery` until dropped.
    pub(crate) fn start(discovery: &dyn Discovery, queue_per_gang: u32) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            waiting: Arc::default(),
            bundles: Bundles::default(),
            queue_per_gang,
        });
        let mut snapshots = discovery.watch();
        if let Some(snapshot) = snapshots.borrow_and_update().as_ref() {
            shared.set_gangs(snapshot);
        }
        let manager = OwnedTask::spawn(manage(Arc::clone(&shared), snapshots));
        Self { shared, _manager: manager }
    }

    /// Whether discovery has said what there is.
    pub(crate) fn discovered(&self) -> bool {
        self.shared.lock().models.is_some()
    }

    /// Waits until every gang found is Ready, and there is one. Fails with the reasons once one never will be.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        let mut changed = self.shared.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let (ready, hopeless) = {
                let state = self.shared.lock();
                let hopeless =
                    state.gangs.values().any(|gang| gang.fault.as_ref().is_some_and(|fault| fault.permanent));
                let ready =
                    !state.gangs.is_empty() && state.gangs.values().all(|gang| gang.phase() == Phase::Ready);
                (ready, hopeless)
            };
            if hopeless {
                return Err(self.reasons());
            }
            if ready || changed.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    /// Why gangs are not Ready.
    pub(crate) fn reasons(&self) -> String {
        let state = self.shared.lock();
        let away = state.gangs.iter().filter(|(_, gang)| gang.phase() != Phase::Ready);
        let reason = |(leader, gang): (&String, &Gang)| match &gang.fault {
            Some(Fault { reason, permanent: _ }) => format!("gang {leader}: {reason}"),
            None => format!("gang {leader}: has not said that it is ready"),
        };
        let reasons: Vec<String> = away.map(reason).collect();
        if reasons.is_empty() { "no gang was found".to_owned() } else { reasons.join("; ") }
    }

    /// The model a request for `name` is checked and tokenized against: the one of the gangs it would go to now. It takes no
    /// turn: with two gangs, every second one would always be the same.
    pub(crate) fn choose(&self, name: &str) -> Result<Model, NotChosen> {
        let state = self.shared.lock();
        let Some(models) = &state.models else {
            return Err(RequestError::Unavailable("the fleet is not known yet".to_owned()).into());
        };
        if !models.contains(name) {
            return Err(RequestError::unknown_model(name, models.iter().map(String::as_str)).into());
        }
        let serving = state.gangs.values().filter(|gang| gang.serves(name));
        let (live, views): (Vec<&Live>, Vec<GangView>) = serving
            .filter_map(|gang| {
                let live = gang.live.as_ref()?;
                Some((live, live.view(Instant::now(), self.shared.queue_per_gang, gang.doubted)))
            })
            .unzip();
        let route = herd_routing::pick(&views, state.turn).map_err(|refusal| NotChosen {
            error: RequestError::refused(name, refusal),
            refusal: Some(refusal),
        })?;
        let picked = live[route.called()];
        let digest = picked.description.digest.clone();
        let alike = live.iter().filter(|live| live.description.digest == digest);
        let context_length = alike.map(|live| live.description.context_length).min().unwrap_or(0);
        Ok(Model { name: name.to_owned(), digest, context_length, text: Arc::clone(&picked.text) })
    }

    /// Picks the gangs for one choice and counts it there. `tried` are avoided, not excluded: whoever gets one of them back
    /// has run out of others.
    pub(crate) fn assign(
        &self,
        model: &Model,
        prompt_tokens: u32,
        tried: &[GangKey],
    ) -> Result<Assignment, Refusal> {
        let mut state = self.shared.lock();
        let turn = state.turn;
        state.turn += 1;
        let now = Instant::now();
        let (candidates, views): (Vec<(&String, &Live)>, Vec<GangView>) = state
            .gangs
            .iter()
            .filter(|(_, gang)| gang.serves(&model.name))
            .filter_map(|(leader, gang)| gang.live.as_ref().map(|live| (leader, gang.doubted, live)))
            .filter(|(.., live)| live.description.digest == model.digest)
            .map(|(leader, doubted, live)| {
                let tried = tried.iter().any(|gang| gang.is(leader, live.connection));
                ((leader, live), live.view(now, self.shared.queue_per_gang, tried || doubted))
            })
            .unzip();
        let route = herd_routing::pick(&views, turn)?;
        let called = candidates[route.called()];
        let prefill = match route {
            Route::Unified { .. } => None,
            Route::Apart { prefill, .. } => Some(candidates[prefill]),
        };
        Ok(Assignment::new(&self.shared, called, prefill, prompt_tokens))
    }

    /// Every name, by name.
    pub(crate) fn models(&self) -> Vec<ListedModel> {
        let state = self.shared.lock();
        let unserved = |name: &String| ListedModel {
            name: name.clone(),
            digest: String::new(),
            context_length: 0,
            ready_gangs: 0,
        };
        let mut models: BTreeMap<&str, ListedModel> =
            state.models.iter().flatten().map(|name| (name.as_str(), unserved(name))).collect();
        for gang in state.gangs.values() {
            let Some(live) = &gang.live else { continue };
            for name in &gang.names {
                let Some(model) = models.get_mut(name.as_str()) else { continue };
                if model.digest.is_empty() {
                    model.digest.clone_from(&live.description.digest);
                    model.context_length = live.description.context_length;
                }
                model.context_length = model.context_length.min(live.description.context_length);
                model.ready_gangs += u32::from(live.phase == Phase::Ready);
            }
        }
        models.into_values().collect()
    }

    /// Names that there are.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        self.shared.lock().models.clone().unwrap_or_default()
    }

    /// Whether there is such a name.
    fn serves(&self, name: &str) -> bool {
        self.shared.lock().models.as_ref().is_some_and(|models| models.contains(name))
    }

    /// Every gang there is.
    pub(crate) fn gangs(&self) -> Vec<GangReport> {
        self.shared.lock().gangs.values().map(Gang::report).collect()
    }

    /// Gangs by (role, phase), for metrics.
    pub(crate) fn census(&self) -> BTreeMap<(&'static str, &'static str), i64> {
        let state = self.shared.lock();
        let mut census = BTreeMap::new();
        for gang in state.gangs.values() {
            *census.entry((gang.role_word(), gang.phase_word())).or_insert(0) += 1;
        }
        census
    }
}

/// Starts and ends the gangs' tasks as discovery has it.
async fn manage(shared: Arc<Shared>, mut snapshots: watch::Receiver<Option<FleetSnapshot>>) {
    let mut tasks: BTreeMap<String, OwnedTask> = BTreeMap::new();
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        if let Some(snapshot) = snapshot {
            let (known, anew) = shared.set_gangs(&snapshot);
            tasks.retain(|leader, _| known.contains(leader) && !anew.contains(leader));
            for gang in snapshot.gangs {
                tasks.entry(gang.leader).or_insert_with_key(|leader| {
                    OwnedTask::spawn(gang::follow(Arc::clone(&shared), leader.clone()))
                });
            }
        }
        if snapshots.changed().await.is_err() {
            // Nobody will say anything new: what is there stays.
            return std::future::pending().await;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gangs there are, and those of them to be connected to anew, at once: they were in doubt, and away.
    fn set_gangs(&self, snapshot: &FleetSnapshot) -> (BTreeSet<String>, BTreeSet<String>) {
        let mut state = self.lock();
        let FleetSnapshot { models, gangs, doubted } = snapshot;
        let leaders: BTreeSet<&str> = gangs.iter().chain(doubted).map(|gang| gang.leader.as_str()).collect();
        state.gangs.retain(|leader, _| leaders.contains(leader.as_str()));
        let served = gangs.iter().flat_map(|gang| &gang.models);
        state.models = Some(models.iter().chain(served).cloned().collect());
        let mut anew = BTreeSet::new();
        for GangEndpoint { models, leader } in gangs {
            let gang = state.gangs.entry(leader.clone()).or_insert_with(|| Gang {
                names: Vec::new(),
                doubted: false,
                live: None,
                fault: None,
            });
            if std::mem::replace(&mut gang.doubted, false) && gang.phase() == Phase::Away {
                anew.insert(leader.clone());
            }
            gang.names.clone_from(models);
        }
        for GangEndpoint { models, leader } in doubted {
            if let Some(gang) = state.gangs.get_mut(leader) {
                gang.doubted = true;
                gang.names.clone_from(models);
            }
        }
        let known = state.gangs.keys().cloned().collect();
        let used = state
            .gangs
            .values()
            .filter_map(|gang| gang.live.as_ref())
            .map(|live| live.description.digest.clone());
        self.bundles.retain(&used.collect());
        drop(state);
        self.changed.send_modify(|count| *count += 1);
        (known, anew)
    }

    fn connected(
        &self,
        leader: &str,
        description: Description,
        role: Role,
        text: Arc<TextModel>,
        client: WorkerClient<Channel>,
    ) {
        let mut state = self.lock();
        state.connections += 1;
        let connection = state.connections;
        let Some(gang) = state.gangs.get_mut(leader) else { return };
        let in_flight = match gang.live.take() {
            Some(before) if before.description.epoch == description.epoch => before.in_flight,
            _ => Arc::default(),
        };
        gang.fault = None;
        gang.live = Some(Live {
            description,
            connection,
            text,
            client,
            role,
            // Until the first report says so.
            phase: Phase::Away,
            load: Load::default(),
            in_flight,
            failures: 0,
            avoid_until: None,
        });
    }

    fn report(&self, leader: &str, event: &WatchEvent) {
        let mut state = self.lock();
        let Some(live) = state.gangs.get_mut(leader).and_then(|gang| gang.live.as_mut()) else { return };
        let before = (live.phase, live.role);
        live.phase = match WirePhase::try_from(event.phase) {
            Ok(WirePhase::Ready) => Phase::Ready,
            Ok(WirePhase::Draining) => Phase::Draining,
            Ok(WirePhase::Unspecified) | Err(_) => Phase::Away,
        };
        if let Some(role) = gang::role(event.role) {
            live.role = role;
        }
        if let Some(load) = event.load {
            live.load = load;
        }
        let changed = (live.phase, live.role) != before;
        drop(state);
        // A load alone is nothing that a request waits for.
        if changed {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// Whether it was there before.
    fn away(&self, leader: &str, fault: Fault) -> bool {
        let mut state = self.lock();
        let Some(gang) = state.gangs.get_mut(leader) else { return false };
        let before = gang.phase();
        gang.fault = Some(fault);
        if let Some(live) = &mut gang.live {
            live.phase = Phase::Away;
            live.load = Load::default();
        }
        drop(state);
        self.changed.send_modify(|count| *count += 1);
        before != Phase::Away
    }

    /// What a request learned about a gang of one epoch.
    fn learned(&self, leader: &str, epoch: u64, lesson: Lesson) {
        let mut state = self.lock();
        let live = state.gangs.get_mut(leader).and_then(|gang| gang.live.as_mut());
        let Some(live) = live.filter(|live| live.description.epoch == epoch) else { return };
        match lesson {
            Lesson::Works => (live.failures, live.avoid_until) = (0, None),
            Lesson::Drains => live.phase = Phase::Draining,
            Lesson::Fails => {
                let pause = FIRST_AVOID.saturating_mul(1 << live.failures.min(16)).min(LAST_AVOID);
                live.failures += 1;
                live.avoid_until = Some(Instant::now() + pause);
            }
        }
    }
}

/// What a request learns about a gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lesson {
    Works,
    Drains,
    Fails,
}

impl Gang {
    fn serves(&self, name: &str) -> bool {
        self.names.iter().any(|served| served == name)
    }

    fn phase(&self) -> Phase {
        self.live.as_ref().map_or(Phase::Away, |live| live.phase)
    }

    fn role_word(&self) -> &'static str {
        match self.live.as_ref().map(|live| live.role) {
            None => "unknown",
            Some(Role::Unified) => "unified",
            Some(Role::Prefill) => "prefill",
            Some(Role::Decode) => "decode",
        }
    }

    fn phase_word(&self) -> &'static str {
        match self.phase() {
            Phase::Ready => "ready",
            Phase::Draining => "draining",
            Phase::Away => "away",
        }
    }

    fn report(&self) -> GangReport {
        let description = self.live.as_ref().map(|live| &live.description);
        let load = self.live.as_ref().map_or_else(Load::default, |live| live.load);
        let Load { running, waiting, waiting_prompt_tokens, kv_blocks_used } = load;
        GangReport {
            id: description.map(|known| known.gang_id.clone()).unwrap_or_default(),
            models: self.names.clone(),
            role: self.role_word().to_owned(),
            phase: self.phase_word().to_owned(),
            revision: description.map(|known| known.revision.clone()).unwrap_or_default(),
            epoch: description.map(|known| known.epoch.to_string()).unwrap_or_default(),
            ranks: description.map_or(0, |known| known.ranks),
            kv_blocks: description.map_or(0, |known| known.kv_blocks),
            kv_blocks_used,
            running,
            waiting,
            waiting_prompt_tokens,
            max_sequences: description.map_or(0, |known| known.max_sequences),
        }
    }
}

impl Live {
    fn view(&self, now: Instant, queue: u32, avoid: bool) -> GangView {
        let Load { running, waiting, waiting_prompt_tokens, kv_blocks_used: _ } = self.load;
        GangView {
            role: self.role,
            phase: self.phase,
            kv_fingerprint: self.description.kv_fingerprint.clone(),
            running,
            waiting,
            waiting_prompt_tokens: u64::from(waiting_prompt_tokens),
            in_flight: self.in_flight.requests.load(Ordering::Relaxed),
            in_flight_prompt_tokens: self.in_flight.prompt_tokens.load(Ordering::Relaxed),
            capacity: self.description.max_sequences.saturating_add(queue),
            avoid: avoid || self.avoid_until.is_some_and(|until| until > now),
        }
    }
}
