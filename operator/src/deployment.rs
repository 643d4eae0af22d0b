//! LlamaDeployment -> revisions, Services, disruption budgets, LlamaPools, status.

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use herd_api::{GangPhase, LlamaDeployment, LlamaPool, ModelStatus, labels};
use herd_control::gang::{PodId, Trouble};
use herd_control::plan::{ObservedDeployment, Unresolved, plan_deployment};
use herd_control::status::{DeploymentView, ScalingView, deployment_status, notes};
use herd_control::{Claims, Refusal, ValidatedDeployment, build, gang, validate};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Resource as _, ResourceExt as _};

use crate::apply::{Manager, Objects};
use crate::context::Context;
use crate::controllers::Watched;
use crate::describe::describe;
use crate::error::ReconcileError;

/// One pass. `all`: every LlamaDeployment there is, for who has which served name.
pub(crate) async fn reconcile(
    context: &Context,
    namespace: &str,
    name: &str,
    all: &[Arc<Watched<LlamaDeployment>>],
) -> Result<(), ReconcileError> {
    let of = Of::new(context, namespace);
    // Read anew: what the watch has may be older than our own last write.
    let Some(deployment) = of.deployments.get(name).await? else { return Ok(()) };
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let uid = deployment.uid().unwrap_or_default();
    let observed = of.observe(name, &uid).await?;
    let claims = Claims::before(&deployment, all.iter().filter_map(|one| one.0.as_ref().ok()));
    let (refusal, accepted) = match validate(&deployment, &claims) {
        Ok(validated) => (None, Some(validated)),
        Err(refusal) => (Some(refusal), None),
    };
    let (unresolved, refused) = match &accepted {
        Some(validated) => of.make(context, validated, &observed).await?,
        None => (None, None),
    };
    // What was just made is part of the answer.
    let pools = of.pools.owned(&selector(name), &uid).await?;
    let model = of.model(&deployment, &pools, name).await;
    let made = Made { refusal, accepted, unresolved };
    of.write_status(context, &deployment, &pools, made, model).await?;
    // Tried again, later and later.
    refused.map_or(Ok(()), |error| Err(ReconcileError::Told(Box::new(error))))
}

fn selector(name: &str) -> String {
    format!("{}={name}", labels::DEPLOYMENT)
}

/// What became of a pass.
struct Made {
    refusal: Option<Refusal>,
    accepted: Option<ValidatedDeployment>,
    unresolved: Option<Unresolved>,
}

/// Pods that ask its source what it has.
fn resolvers(name: &str) -> String {
    format!("{},app.kubernetes.io/instance={name}", labels::RESOLVES_SELECTOR)
}

/// What a LlamaDeployment is made of, in its namespace.
struct Of {
    deployments: Objects<LlamaDeployment>,
    pools: Objects<LlamaPool>,
    revisions: Objects<ControllerRevision>,
    services: Objects<Service>,
    budgets: Objects<PodDisruptionBudget>,
    resolvers: Objects<Pod>,
    pods: Api<Pod>,
}

impl Of {
    fn new(context: &Context, namespace: &str) -> Self {
        let client = || context.client.clone();
        Self {
            deployments: Objects::new(Api::namespaced(client(), namespace), "LlamaDeployment"),
            pools: Objects::new(Api::namespaced(client(), namespace), "LlamaPool"),
            revisions: Objects::new(Api::namespaced(client(), namespace), "ControllerRevision"),
            services: Objects::new(Api::namespaced(client(), namespace), "Service"),
            budgets: Objects::new(Api::namespaced(client(), namespace), "PodDisruptionBudget"),
            resolvers: Objects::new(Api::namespaced(client(), namespace), "Pod"),
            pods: Api::namespaced(client(), namespace),
        }
    }

    async fn observe(&self, name: &str, uid: &str) -> Result<ObservedDeployment, ReconcileError> {
        let selector = selector(name);
        Ok(ObservedDeployment {
            pools: self.pools.owned(&selector, uid).await?,
            revisions: self.revisions.owned(&selector, uid).await?,
            resolvers: self.resolvers.owned(&resolvers(name), uid).await?,
            now: Timestamp::now(),
        })
    }

    /// In the order in which one needs the other: pools are made from revisions, gateways find pods through Services. What is
    /// not known of the source, and why the pod that would ask it was refused.
    async fn make(
        &self,
        context: &Context,
        deployment: &ValidatedDeployment,
        observed: &ObservedDeployment,
    ) -> Result<(Option<Unresolved>, Option<ReconcileError>), ReconcileError> {
        let mut plan = plan_deployment(deployment, observed);
        let mut refused = None;
        for planned in &plan.revisions {
            let revision = build::revision(deployment, planned, &context.defaults)
                .map_err(|source| ReconcileError::Encode { name: planned.revision.clone(), source })?;
            self.revisions.create(&revision, Manager::Operator).await?;
        }
        if !plan.pools.is_empty() {
            self.services.apply(&build::ranks_service(deployment)).await?;
            self.services.apply(&build::leaders_service(deployment)).await?;
        }
        for planned in &plan.pools {
            self.budgets.apply(&build::disruption_budget(deployment, planned)).await?;
            if planned.is_new {
                self.pools.create(&build::new_pool(deployment, planned), Manager::Scale).await?;
            }
            self.pools.apply(&build::pool(deployment, planned)).await?;
        }
        for pool in &plan.delete_pools {
            self.budgets.delete(pool, None).await?;
            self.pools.delete(pool, None).await?;
        }
        for revision in &plan.delete_revisions {
            self.revisions.delete(revision, None).await?;
        }
        if let Some(planned) = &plan.resolve {
            let resolver = build::resolver(deployment, planned, &context.defaults)
                .map_err(|source| ReconcileError::Source { name: planned.word.clone(), source })?;
            if let Err(error) = self.resolvers.create(&resolver, Manager::Operator).await {
                let Some(said) = error.refusal() else { return Err(error) };
                if let Some(unresolved) = &mut plan.unresolved {
                    unresolved.trouble = Some(Trouble::not_created(said));
                }
                refused = Some(error);
            }
        }
        // After what they found was stored.
        for PodId { name, uid } in plan.delete_resolvers {
            self.resolvers.delete(&name, Some(uid)).await?;
        }
        Ok((plan.unresolved, refused))
    }

    /// Asked of a gang once for each revision that serves.
    async fn model(
        &self,
        deployment: &LlamaDeployment,
        pools: &[LlamaPool],
        name: &str,
    ) -> Option<ModelStatus> {
        let status = deployment.status.as_ref();
        let known = status.and_then(|status| status.model.clone());
        let serves: Vec<&str> = pools
            .iter()
            .flat_map(|pool| pool.status.iter().flat_map(|status| &status.gangs))
            .filter(|gang| gang.phase == GangPhase::Ready)
            .map(|gang| gang.revision.as_str())
            .collect();
        let is_known = |revision: &str| {
            status.is_some_and(|status| {
                status.revisions.iter().any(|known| known.current.as_deref() == Some(revision))
            })
        };
        if serves.is_empty() || known.is_some() && serves.iter().all(|revision| is_known(revision)) {
            return known;
        }
        let params = kube::api::ListParams::default().labels(&selector(name));
        let pods = self.pods.list(&params).await.map(|pods| pods.items).unwrap_or_default();
        let ready = gang::gangs(&pods).into_iter().filter(|gang| gang.phase == GangPhase::Ready);
        // What was known stays where nobody can be asked.
        match ready.max_by_key(|gang| gang.created).and_then(|leader| leader.address) {
            Some(leader) => describe(&leader).await.or(known),
            None => known,
        }
    }

    async fn write_status(
        &self,
        context: &Context,
        deployment: &LlamaDeployment,
        pools: &[LlamaPool],
        made: Made,
        model: Option<ModelStatus>,
    ) -> Result<(), ReconcileError> {
        let Made { refusal, accepted, unresolved } = made;
        let taken = accepted.as_ref().and_then(|accepted| {
            accepted.name_taken.as_deref().map(|message| (message, !accepted.served_names.is_empty()))
        });
        let verdict = context.verdicts.get(&deployment.uid().unwrap_or_default());
        let status = deployment_status(DeploymentView {
            deployment,
            pools,
            refusal: refusal.as_ref(),
            unresolved: unresolved.as_ref(),
            name_taken: taken,
            model: model.as_ref(),
            scaling: ScalingView {
                scales: accepted.as_ref().is_some_and(ValidatedDeployment::is_scaled),
                metrics: verdict.metrics.as_ref(),
                last_scale: verdict.last_scale.as_ref(),
            },
            now: Timestamp::now(),
        });
        if deployment.status.as_ref() == Some(&status) {
            return Ok(());
        }
        self.deployments.patch_status(&deployment.name_any(), &status).await?;
        let before = deployment.status.as_ref().map_or(&[][..], |status| &status.conditions);
        for note in notes(before, &status.conditions) {
            context.tell(&deployment.object_ref(&()), "Reconcile", note).await;
        }
        Ok(())
    }
}
