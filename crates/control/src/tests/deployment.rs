//! A LlamaDeployment as a whole: what is planned of it, and what its status says.

use herd_api::condition::{self, reason};
use herd_api::{
    GangPhase, GangStatus, LastScale, LlamaDeployment, LlamaDeploymentStatus, LlamaPool, ModelStatus, Role,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde_json::{Value, json};

use super::{checked, object, spec};
use crate::plan::{DeploymentPlan, ObservedDeployment, plan_deployment};
use crate::revision::{Defaults, ModelCache, hash};
use crate::status::{DeploymentView, Note, ScalingView, deployment_status, notes};
use crate::{Refusal, ValidatedDeployment, build};

/// A cluster that does what it is told: what is planned is there, and gangs become Ready when told to.
#[derive(Default)]
pub(super) struct Cluster(pub(super) ObservedDeployment);

impl Cluster {
    /// One pass: plan, and do it.
    pub(super) fn pass(&mut self, deployment: &ValidatedDeployment) -> DeploymentPlan {
        let plan = plan_deployment(deployment, &self.0);
        let ObservedDeployment { pools, revisions, resolvers, .. } = &mut self.0;
        let defaults = Defaults { worker_image: "w:1".to_owned(), model_cache: ModelCache::default() };
        for planned in &plan.revisions {
            revisions.push(build::revision(deployment, planned, &defaults).unwrap());
        }
        for planned in &plan.pools {
            let mut pool = build::pool(deployment, planned);
            match pools.iter().position(|pool| pool.spec.role == planned.role) {
                None => pool.spec.replicas = build::new_pool(deployment, planned).spec.replicas,
                Some(old) => {
                    let old = pools.remove(old);
                    (pool.spec.replicas, pool.status) = (old.spec.replicas, old.status);
                }
            }
            pools.push(pool);
        }
        pools.retain(|pool| !plan.delete_pools.contains(&pool.name_any()));
        revisions.retain(|revision| !plan.delete_revisions.contains(&revision.name_any()));
        resolvers.retain(|pod| plan.delete_resolvers.iter().all(|gone| gone.name != pod.name_any()));
        if let Some(planned) = &plan.resolve {
            resolvers.push(build::resolver(deployment, planned, &defaults).unwrap());
        }
        plan
    }

    pub(super) fn pool(&mut self, role: Role) -> &mut LlamaPool {
        self.0.pools.iter_mut().find(|pool| pool.spec.role == role).unwrap()
    }

    /// The gangs of a role, all of its target, in this phase.
    pub(super) fn gangs(&mut self, role: Role, phase: GangPhase) {
        let pool = self.pool(role);
        let target = pool.spec.targets[0].clone();
        let gang = |number| GangStatus {
            id: format!("g{number}"),
            revision: target.revision.clone(),
            phase,
            restarts: 0,
            message: None,
        };
        let mut status = pool.status.take().unwrap_or_default();
        status.gangs = (0..target.replicas).map(gang).collect();
        status.ready_replicas = if phase == GangPhase::Ready { target.replicas } else { 0 };
        pool.status = Some(status);
    }

    fn roles(&self) -> Vec<Role> {
        let mut roles: Vec<Role> = self.0.pools.iter().map(|pool| pool.spec.role).collect();
        roles.sort();
        roles
    }
}

pub(super) fn apart(spec: &mut Value) {
    spec.as_object_mut().unwrap().remove("unified");
    spec["prefill"] = json!({"minReplicas": 1, "maxReplicas": 3});
    spec["decode"] = json!({"minReplicas": 2, "maxReplicas": 4});
}

#[test]
fn a_plan_that_was_done_plans_nothing_new() {
    let deployment = checked(apart).unwrap();
    let mut cluster = Cluster::default();
    let first = cluster.pass(&deployment);
    // Both roles are made from the same fields.
    assert_eq!(first.revisions.len(), 1);
    let sizes: Vec<_> = first.pools.iter().map(|pool| (pool.role, pool.is_new, pool.desired())).collect();
    assert_eq!(sizes, [(Role::Prefill, true, 1), (Role::Decode, true, 2)]);
    let second = cluster.pass(&deployment);
    assert!(
        second.revisions.is_empty() && second.delete_pools.is_empty() && second.delete_revisions.is_empty()
    );
    assert!(second.pools.iter().all(|pool| !pool.is_new));
}

#[test]
fn replicas_that_were_set_stay_within_the_bounds() {
    let deployment = checked(apart).unwrap();
    let mut cluster = Cluster::default();
    cluster.pass(&deployment);
    for (set, runs) in [(3, 3), (9, 4), (0, 2)] {
        cluster.pool(Role::Decode).spec.replicas = Some(set);
        let plan = cluster.pass(&deployment);
        assert_eq!(plan.pools[1].desired(), runs);
        // Whoever scales finds what they wrote.
        assert_eq!(cluster.pool(Role::Decode).spec.replicas, Some(set));
    }
}

#[test]
fn pools_that_are_replaced_serve_until_all_others_do() {
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let changed = checked(apart).unwrap();
    cluster.pass(&changed);
    cluster.gangs(Role::Prefill, GangPhase::Ready);
    cluster.gangs(Role::Decode, GangPhase::Starting);
    cluster.pass(&changed);
    assert_eq!(cluster.roles(), [Role::Prefill, Role::Decode, Role::Unified]);
    cluster.gangs(Role::Decode, GangPhase::Ready);
    assert_eq!(cluster.pass(&changed).delete_pools, ["m-unified"]);
    assert_eq!(cluster.roles(), [Role::Prefill, Role::Decode]);
}

#[test]
fn old_revisions_go_and_those_in_use_stay() {
    let mut cluster = Cluster::default();
    let first = checked(|_| {}).unwrap();
    cluster.pass(&first);
    // A gang of the first one is still there at the end.
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let mut last = first.clone();
    for length in 1..20 {
        last = checked(|spec| spec["model"]["contextLength"] = json!(length)).unwrap();
        cluster.pass(&last);
    }
    let kept: Vec<String> = cluster.0.revisions.iter().map(ResourceExt::name_any).collect();
    for used in [&first, &last] {
        let name = herd_api::names::revision("m", &hash(&used.pools[0].gang));
        assert!(kept.contains(&name), "{name} of {kept:?}");
    }
    // The gang's, the target, the target before it, and five more.
    assert!(kept.len() <= 8, "{kept:?}");
    let mut numbers: Vec<i64> = cluster.0.revisions.iter().filter_map(|stored| stored.revision).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), kept.len(), "numbers are given once");
    // Going back finds the first one where it was.
    assert!(cluster.pass(&first).revisions.is_empty());
}

#[test]
fn without_a_name_nothing_is_made_and_what_runs_goes_on() {
    let mut deployment = checked(|_| {}).unwrap();
    let names = std::mem::take(&mut deployment.served_names);
    let mut cluster = Cluster::default();
    assert_eq!(cluster.pass(&deployment), DeploymentPlan::default());
    deployment.served_names = names;
    cluster.pass(&deployment);
    deployment.served_names.clear();
    cluster.pass(&deployment);
    assert_eq!(cluster.roles(), [Role::Unified]);
}

fn status(
    deployment: &LlamaDeployment,
    pools: &[LlamaPool],
    refusal: Option<&Refusal>,
    name_taken: Option<(&str, bool)>,
) -> LlamaDeploymentStatus {
    let now = Timestamp::UNIX_EPOCH;
    deployment_status(DeploymentView {
        deployment,
        pools,
        refusal,
        unresolved: None,
        name_taken,
        model: None,
        scaling: ScalingView::default(),
        now,
    })
}

/// Status, reason and message of a condition.
fn told<'a>(status: &'a LlamaDeploymentStatus, type_: &str) -> [&'a str; 3] {
    let found = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
    [&found.status, &found.reason, &found.message]
}

/// A pool's own words, as far as its deployment quotes them.
fn says(cluster: &mut Cluster, role: Role, type_: &str, status: &str, reason: &str, message: &str) {
    let said = json!({"type": type_, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-01-02T00:00:00Z"});
    let said: Condition = serde_json::from_value(said).unwrap();
    let pool = cluster.pool(role);
    pool.status.get_or_insert_default().conditions.push(said);
}

#[test]
fn ready_is_when_every_role_can_serve() {
    let deployment = object(spec());
    let validated = checked(apart).unwrap();
    let mut cluster = Cluster::default();
    let none = status(&deployment, &cluster.0.pools, None, None);
    assert_eq!(told(&none, condition::READY)[..2], ["False", reason::NO_GANG_READY]);
    cluster.pass(&validated);
    cluster.gangs(Role::Decode, GangPhase::Ready);
    let half = status(&deployment, &cluster.0.pools, None, None);
    assert_eq!(half.gangs.as_deref(), Some("prefill 0/1, decode 2/2"));
    assert_eq!(
        told(&half, condition::READY),
        ["False", reason::NO_GANG_READY, "prefill: none of 1 gang is ready yet"]
    );
    cluster.gangs(Role::Prefill, GangPhase::Ready);
    let whole = status(&deployment, &cluster.0.pools, None, None);
    assert_eq!(
        told(&whole, condition::READY),
        ["True", reason::ALL_GANGS_READY, "gangs ready: prefill: 1 of 1, decode: 2 of 2"]
    );
    assert_eq!(told(&whole, condition::PROGRESSING)[..2], ["False", reason::AS_EXPECTED]);
    assert_eq!(told(&whole, condition::MODEL_AVAILABLE)[0], "True");
    let revision = hash(&validated.pools[0].gang);
    assert!(whole.revisions.iter().all(|known| known.current.as_ref() == Some(&revision)));
}

#[test]
fn a_pool_that_knows_why_is_quoted_before_one_that_waits() {
    let deployment = object(spec());
    let mut cluster = Cluster::default();
    cluster.pass(&checked(apart).unwrap());
    says(&mut cluster, Role::Prefill, condition::READY, "False", reason::NO_GANG_READY, "none of 1 gang");
    says(
        &mut cluster,
        Role::Decode,
        condition::READY,
        "False",
        "ImpossibleParallelism",
        "tensor 2 cannot be",
    );
    says(
        &mut cluster,
        Role::Decode,
        condition::DEGRADED,
        "True",
        "ImpossibleParallelism",
        "tensor 2 cannot be",
    );
    let status = status(&deployment, &cluster.0.pools, None, None);
    let quoted = ["ImpossibleParallelism", "decode: tensor 2 cannot be"];
    assert_eq!(told(&status, condition::READY)[1..], quoted);
    assert_eq!(told(&status, condition::DEGRADED)[1..], quoted);
    assert_eq!(told(&status, condition::MODEL_AVAILABLE)[..2], ["Unknown", reason::LOADING]);
}

#[test]
fn a_change_is_progressing_until_the_last_old_gang_is_gone() {
    let deployment = object(spec());
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    cluster.gangs(Role::Unified, GangPhase::Ready);
    cluster.pass(&checked(|spec| spec["model"]["contextLength"] = json!(64)).unwrap());
    let changing = status(&deployment, &cluster.0.pools, None, None);
    assert_eq!(told(&changing, condition::PROGRESSING)[..2], ["True", reason::REVISION_CHANGING]);
    assert_eq!(told(&changing, condition::READY)[0], "True");
    assert_ne!(changing.revisions[0].current.as_deref(), Some(changing.revisions[0].target.as_str()));
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let changed = status(&deployment, &cluster.0.pools, None, None);
    assert_eq!(told(&changed, condition::PROGRESSING)[0], "False");
    assert_eq!(changed.revisions[0].current.as_deref(), Some(changed.revisions[0].target.as_str()));
}

#[test]
fn a_refused_change_leaves_what_serves_ready() {
    let deployment = object(spec());
    let refusal = checked(|spec| spec["model"]["source"] = json!("hf://a")).unwrap_err();
    let nothing = status(&deployment, &[], Some(&refusal), None);
    for type_ in [condition::READY, condition::MODEL_AVAILABLE] {
        assert_eq!(told(&nothing, type_), ["False", reason::SOURCE_INVALID, &refusal.message]);
    }
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let serves = status(&deployment, &cluster.0.pools, Some(&refusal), None);
    assert_eq!(told(&serves, condition::READY)[0], "True");
    assert_eq!(told(&serves, condition::DEGRADED)[..2], ["True", reason::SOURCE_INVALID]);
}

#[test]
fn a_name_that_is_taken_degrades_and_without_any_left_it_is_not_ready() {
    let deployment = object(spec());
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let some = status(&deployment, &cluster.0.pools, None, Some(("x/m has it", true)));
    assert_eq!(told(&some, condition::DEGRADED), ["True", reason::SERVED_NAME_TAKEN, "x/m has it"]);
    assert_eq!(told(&some, condition::READY)[0], "True");
    let none = status(&deployment, &cluster.0.pools, None, Some(("x/m has it", false)));
    assert_eq!(told(&none, condition::READY)[..2], ["False", reason::SERVED_NAME_TAKEN]);
}

/// Nothing is written where nothing changed: else every write would wake the next pass.
#[test]
fn a_status_of_the_same_is_the_same() {
    let mut deployment = object(spec());
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    cluster.gangs(Role::Unified, GangPhase::Ready);
    let model = ModelStatus { digest: "d".to_owned(), context_length: 8, kv_tokens_per_gang: 64 };
    let view = |deployment: &LlamaDeployment, second| {
        deployment_status(DeploymentView {
            deployment,
            pools: &cluster.0.pools,
            refusal: None,
            unresolved: None,
            name_taken: None,
            model: Some(&model),
            scaling: ScalingView::default(),
            now: Timestamp::from_second(second).unwrap(),
        })
    };
    let first = view(&deployment, 1);
    deployment.status = Some(first.clone());
    assert_eq!(view(&deployment, 2), first);
}

#[test]
fn what_the_autoscaler_said_stays_until_it_says_something_else() {
    let mut deployment = object(spec());
    let mut cluster = Cluster::default();
    cluster.pass(&checked(|_| {}).unwrap());
    let status = |deployment: &LlamaDeployment, scaling: ScalingView<'_>| {
        deployment_status(DeploymentView {
            deployment,
            pools: &cluster.0.pools,
            refusal: None,
            unresolved: None,
            name_taken: None,
            model: None,
            scaling,
            now: Timestamp::UNIX_EPOCH,
        })
    };
    let quiet = ScalingView { scales: true, ..ScalingView::default() };
    let none = status(&deployment, quiet);
    assert!(none.conditions.iter().all(|one| one.type_ != condition::METRICS_AVAILABLE));
    let metrics =
        condition::State::new(condition::METRICS_AVAILABLE, Some(false), reason::STALE_DATA, "1 is old");
    let time = Time(Timestamp::UNIX_EPOCH);
    let last = LastScale { time, prefill: None, decode: None, unified: Some(2), reason: "1 -> 2".to_owned() };
    let says = ScalingView { metrics: Some(&metrics), last_scale: Some(&last), ..quiet };
    let said = status(&deployment, says);
    assert_eq!(told(&said, condition::METRICS_AVAILABLE), ["False", reason::STALE_DATA, "1 is old"]);
    assert_eq!(said.last_scale.as_ref(), Some(&last));
    assert_eq!(notes(&[], &said.conditions).iter().filter(|note| note.warning).count(), 1);
    // After a restart of the operator.
    deployment.status = Some(said.clone());
    assert_eq!(status(&deployment, quiet), said);
    // Scaled by somebody else.
    let others = status(&deployment, ScalingView::default());
    assert!(others.conditions.iter().all(|one| one.type_ != condition::METRICS_AVAILABLE));
    assert_eq!(others.last_scale, Some(last));
}

#[test]
fn people_are_told_once_and_not_of_routine() {
    let now = Timestamp::UNIX_EPOCH;
    let conditions = |states: &[(&'static str, bool, &str)]| {
        let states: Vec<condition::State> = states
            .iter()
            .map(|(type_, status, reason)| condition::State::new(type_, Some(*status), *reason, "why"))
            .collect();
        condition::merge(&[], &states, None, now)
    };
    let starting = conditions(&[
        (condition::READY, false, reason::NO_GANG_READY),
        (condition::PROGRESSING, true, reason::GANGS_CHANGING),
    ]);
    assert!(notes(&[], &starting).is_empty());
    let broken = conditions(&[
        (condition::READY, false, "ImpossibleParallelism"),
        (condition::DEGRADED, true, "ImpossibleParallelism"),
    ]);
    let told = Note { warning: true, reason: "ImpossibleParallelism".to_owned(), message: "why".to_owned() };
    assert_eq!(notes(&starting, &broken), [told]);
    assert!(notes(&broken, &broken).is_empty());
    let well = conditions(&[(condition::READY, true, reason::ALL_GANGS_READY)]);
    let told = notes(&broken, &well);
    assert_eq!((told.len(), told[0].warning), (1, false));
}
