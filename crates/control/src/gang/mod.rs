//! What the pods of a pool say about its gangs.

mod last_words;
mod pod;

use std::collections::{BTreeMap, BTreeSet};

use herd_api::GangPhase;
use herd_api::condition::reason;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

pub use pod::Member;
pub(crate) use pod::PodTrouble;

/// One copy of the model, as its pods have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gang {
    /// Generated, never used again.
    pub id: String,
    /// What it was made from.
    pub revision: String,
    /// The pods that there are, by rank.
    pub pods: Vec<Member>,
    /// Where it stands: where its worst pod does.
    pub phase: GangPhase,
    /// When its first pod was made.
    pub created: Timestamp,
    /// Times its processes were started anew in place.
    pub restarts: i32,
    /// Why it is not Ready, where its pods say so.
    pub trouble: Option<Trouble>,
    /// Of the leader, once it has one.
    pub address: Option<String>,
}

/// One pod, and no later one of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodId {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What keeps a gang from being Ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it concerns.
    pub kind: TroubleKind,
    /// A constant, or the worker's own.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// What trouble concerns; what a person should hear of first stands first: what a worker said of itself, then what waiting
/// will not mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TroubleKind {
    /// The worker ended with an error.
    Worker,
    /// An image or volume cannot be had.
    Source,
    /// A pod is lost.
    Lost,
    /// The scheduler finds no node.
    Scheduling,
    /// None: the model is being downloaded.
    Download,
}

/// Groups the pods of one pool into its gangs, by id. Pods without the labels of a gang are none.
pub fn gangs(pods: &[Pod]) -> Vec<Gang> {
    let mut gangs: BTreeMap<String, (String, usize, Vec<Member>)> = BTreeMap::new();
    for pod in pods {
        let Some(pod::Labelled { gang, revision, pods, member }) = pod::read(pod) else { continue };
        let (_, wanted, members) = gangs.entry(gang).or_insert_with(|| (revision, 1, Vec::new()));
        *wanted = pods.max(*wanted);
        members.push(member);
    }
    gangs
        .into_iter()
        .map(|(id, (revision, wanted, members))| Gang::new(id, revision, wanted, members))
        .collect()
}

impl Gang {
    fn new(id: String, revision: String, wanted: usize, mut pods: Vec<Member>) -> Self {
        pods.sort_by_key(|pod| pod.rank);
        let has_leader = pods.first().is_some_and(|pod| pod.rank == 0);
        let worst = pods.iter().map(|pod| pod.phase).min_by_key(|phase| badness(*phase));
        let (phase, trouble) = match worst.unwrap_or(GangPhase::Pending) {
            GangPhase::Draining => (GangPhase::Draining, None),
            // What is left of a gang that went: its leader goes first.
            _ if !has_leader => (GangPhase::Draining, None),
            GangPhase::Failed => (GangPhase::Failed, worst_trouble(&pods, |kind| kind == TroubleKind::Lost)),
            _ if pods.len() < wanted => (GangPhase::Failed, Some(incomplete(pods.len(), wanted))),
            phase => (phase, worst_trouble(&pods, |_| true)),
        };
        Self {
            id,
            revision,
            phase,
            created: pods.iter().map(|pod| pod.created).min().unwrap_or(Timestamp::MAX),
            restarts: pods.iter().map(|pod| pod.restarts).max().unwrap_or(0),
            trouble,
            address: pods.first().filter(|_| has_leader).and_then(|leader| leader.address.clone()),
            pods,
        }
    }

    /// The pod of rank 0, while there is one.
    pub fn leader(&self) -> Option<&Member> {
        self.pods.first().filter(|pod| pod.rank == 0)
    }

    /// What the scheduler says, where some of its pods hold a node's room and others find none.
    pub fn half_scheduled(&self) -> Option<&Trouble> {
        let unschedulable = |pod: &Member| {
            pod.trouble.as_ref().is_some_and(|trouble| trouble.kind == TroubleKind::Scheduling)
        };
        let waits = self.pods.iter().find(|pod| unschedulable(pod))?;
        let holds = self.pods.iter().any(|pod| pod.has_node);
        waits.trouble.as_ref().filter(|_| holds)
    }
}

/// The worst is the least.
fn badness(phase: GangPhase) -> usize {
    match phase {
        GangPhase::Draining => 0,
        GangPhase::Failed => 1,
        GangPhase::CrashLooping => 2,
        GangPhase::Pending => 3,
        GangPhase::Starting => 4,
        GangPhase::Ready => 5,
    }
}

fn incomplete(left: usize, wanted: usize) -> Trouble {
    let message = format!("of the {wanted} pods of a gang there are {left}");
    Trouble::new(TroubleKind::Lost, reason::GANG_INCOMPLETE.to_owned(), &message)
}

/// Of two of a kind the one of the lower rank: the leader knows of its followers.
fn worst_trouble(pods: &[Member], of_kind: impl Fn(TroubleKind) -> bool) -> Option<Trouble> {
    let troubled = pods.iter().filter_map(|pod| pod.trouble.as_ref().map(|trouble| (pod.rank, trouble)));
    let troubled = troubled.filter(|(_, trouble)| of_kind(trouble.kind));
    let (rank, Trouble { kind, reason, message }) =
        troubled.min_by_key(|(rank, trouble)| (trouble.kind, *rank))?;
    let message = match kind {
        // Of a group the scheduler tells some pods that others found no node, and those why.
        TroubleKind::Scheduling => {
            let of_kind = pods.iter().filter_map(|pod| pod.trouble.as_ref()).filter(|one| one.kind == *kind);
            let messages: BTreeSet<&str> = of_kind.map(|one| one.message.as_str()).collect();
            messages.into_iter().collect::<Vec<_>>().join("; ")
        }
        TroubleKind::Worker | TroubleKind::Source | TroubleKind::Lost if rank > 0 => {
            format!("the pod of rank {rank}: {message}")
        }
        _ => message.clone(),
    };
    Some(Trouble::new(*kind, reason.clone(), &message))
}

/// A message is shown in conditions and events: a person reads it.
const MAX_MESSAGE: usize = 1024;

impl Trouble {
    /// Of a pod that the API server refused in these words.
    pub fn not_created(said: &str) -> Self {
        let message = format!("the API server refuses a pod: {said}");
        Self::new(TroubleKind::Lost, reason::FAILED_CREATE.to_owned(), &message)
    }

    /// With a message that is not too long.
    fn new(kind: TroubleKind, reason: String, message: &str) -> Self {
        let message = &message[..message.floor_char_boundary(MAX_MESSAGE)];
        Self { kind, reason, message: message.to_owned() }
    }
}
