//! Scales the pools of LlamaDeployments by what Prometheus knows of their gangs, while this operator leads.
//!
//! The decisions are made in `herd_control::autoscale`; here is what they need, and what is done about them.

mod apply;
#[cfg(test)]
mod fake;
mod logs;
mod observe;
mod options;
mod prometheus;
mod queries;
#[cfg(test)]
mod real_prometheus;
#[cfg(test)]
mod tests;
mod verdicts;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use herd_api::condition::{self, State, reason};
use herd_api::{LastScale, LlamaDeployment, LlamaPool, Role};
use herd_control::autoscale::{Decision, Policy, PoolDecision};
use herd_control::status::Note;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Resource as _;
use kube::runtime::reflector::Store;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

pub(crate) use logs::Logs;
pub(crate) use options::AutoscalerOptions;
pub(crate) use verdicts::Verdicts;

use self::observe::Scaled;
use self::prometheus::Prometheus;
use self::queries::{Gathered, Queries};
use crate::context::Context;
use crate::controllers::Watched;

/// One for as long as this operator leads.
#[derive(Debug)]
pub(crate) struct Autoscaler {
    prometheus: Option<Prometheus>,
    queries: Queries,
    policy: Policy,
    logs: Logs,
    /// Wakes whoever writes the status of deployments.
    news: mpsc::Sender<()>,
}

impl Autoscaler {
    /// And what comes when a deployment's status has to be looked at again.
    pub(crate) fn new(
        options: &AutoscalerOptions,
        namespace: Option<&str>,
        logs: Logs,
    ) -> (Self, impl Stream<Item = ()> + Send + use<>) {
        // One that waits to be heard stands for all.
        let (news, mut heard) = mpsc::channel(1);
        let policy = options.policy();
        let queries = Queries::new(namespace, policy.rate_window_ms());
        let autoscaler = Self { prometheus: options.prometheus(), queries, policy, logs, news };
        (autoscaler, futures::stream::poll_fn(move |cx| heard.poll_recv(cx)))
    }

    /// Decides again and again until `stop`.
    pub(crate) async fn run(
        self,
        context: &Context,
        deployments: Store<Watched<LlamaDeployment>>,
        pools: Store<Watched<LlamaPool>>,
        stop: CancellationToken,
    ) {
        let work = async {
            // An error is that the controllers have ended.
            if deployments.wait_until_ready().await.is_err() || pools.wait_until_ready().await.is_err() {
                return;
            }
            let mut ticks = interval(Duration::from_millis(self.policy.interval_ms.unsigned_abs()));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.tick(context, &deployments.state(), &pools.state(), Timestamp::now()).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// One decision about each deployment.
    async fn tick(
        &self,
        context: &Context,
        deployments: &[Arc<Watched<LlamaDeployment>>],
        pools: &[Arc<Watched<LlamaPool>>],
        now: Timestamp,
    ) {
        let read = deployments.iter().filter_map(|one| one.0.as_ref().ok());
        let scaled: Vec<Scaled> = read.filter_map(Scaled::new).collect();
        let uids: HashSet<String> = scaled.iter().map(|one| one.uid.clone()).collect();
        context.verdicts.keep(&uids);
        self.logs.keep(&uids);
        let Some(prometheus) = &self.prometheus else {
            for one in &scaled {
                self.say(context, &one.uid, not_configured(), None);
            }
            return;
        };
        if scaled.is_empty() {
            return;
        }
        let gathered = self.queries.ask(prometheus).await;
        context.metrics.asked_prometheus(gathered.is_ok());
        let mut gangs: BTreeMap<Role, i64> = BTreeMap::new();
        let gathered: Result<Gathered, String> = gathered.map_err(|error| {
            tracing::warn!("no metrics to scale by: {error}");
            error.to_string()
        });
        for one in &scaled {
            let Some(input) = one.input(pools, &gathered, self.policy, now.as_millisecond()) else {
                continue;
            };
            let of = &one.validated;
            let decision = self.logs.decide(&of.namespace, &of.name, &one.uid, input);
            let last_scale = self.act(context, one, &decision, now).await;
            for pool in &decision.pools {
                *gangs.entry(pool.role).or_default() += i64::from(pool.to);
            }
            self.say(context, &one.uid, decision.metrics.state(), last_scale);
        }
        context.metrics.autoscaled(&gangs);
        self.logs.cut();
    }

    fn say(&self, context: &Context, uid: &str, metrics: State, last_scale: Option<LastScale>) {
        if context.verdicts.put(uid, metrics, last_scale) {
            // Full: it is heard already.
            let _ = self.news.try_send(());
        }
    }

    /// Does what was decided; `None` where that was nothing, or nothing could be done.
    async fn act(
        &self,
        context: &Context,
        scaled: &Scaled,
        decision: &Decision,
        now: Timestamp,
    ) -> Option<LastScale> {
        let mut said = Vec::new();
        let mut last_scale =
            LastScale { time: Time(now), prefill: None, decode: None, unified: None, reason: String::new() };
        for PoolDecision { role, from, to, why } in &decision.pools {
            context.metrics.decided(direction(*from, *to));
            let mut gangs = *from;
            if from != to {
                match apply::scale(context, scaled, *role, *from, *to).await {
                    Ok(()) => {
                        gangs = *to;
                        let message = format!("{role} {from} -> {to}: {why}");
                        let reason = if to > from { "ScaledUp" } else { "ScaledDown" };
                        let note =
                            Note { warning: false, reason: reason.to_owned(), message: message.clone() };
                        context.tell(&scaled.object.object_ref(&()), "Scale", note).await;
                        said.push(message);
                    }
                    Err(error) => tracing::warn!(deployment = scaled.validated.name, %role, "{error}"),
                }
            }
            match role {
                Role::Prefill => last_scale.prefill = Some(gangs),
                Role::Decode => last_scale.decode = Some(gangs),
                Role::Unified => last_scale.unified = Some(gangs),
            }
        }
        if said.is_empty() {
            return None;
        }
        last_scale.reason = said.join("; ");
        tracing::info!(
            namespace = scaled.validated.namespace,
            deployment = scaled.validated.name,
            "{}",
            last_scale.reason
        );
        Some(last_scale)
    }
}

fn direction(from: i32, to: i32) -> &'static str {
    match to.cmp(&from) {
        std::cmp::Ordering::Greater => "up",
        std::cmp::Ordering::Less => "down",
        std::cmp::Ordering::Equal => "hold",
    }
}

fn not_configured() -> State {
    let message = "the operator was not told where Prometheus is: pools stay as they are; give the chart prometheus.url, \
                   or set autoscaling.mode to Off or External";
    State::new(condition::METRICS_AVAILABLE, Some(false), reason::PROMETHEUS_NOT_CONFIGURED, message)
}
