//! What the API server and the gateway say, put together. Pure.

use std::collections::BTreeMap;

use herd_gateway::{FleetReport, GangReport, LastScale, ModelReport};
use serde::Serialize;
use serde_json::Value;

/// All that is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Overview {
    pub(super) deployments: Vec<Deployment>,
    /// What is wrong with the picture: the gateway is away, say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
}

/// A LlamaDeployment, or a served model where only a gateway was asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Deployment {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) conditions: Vec<Condition>,
    pub(super) pools: Vec<Pool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_scale: Option<LastScale>,
    /// By served name; none while the gateway is away.
    pub(super) models: Vec<ModelReport>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Condition {
    pub(super) kind: String,
    pub(super) status: String,
    pub(super) reason: String,
    pub(super) message: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Pool {
    pub(super) role: String,
    /// None where only a gateway was asked.
    pub(super) replicas: Option<i64>,
    pub(super) gangs: Vec<Gang>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Gang {
    pub(super) id: String,
    pub(super) phase: String,
    pub(super) revision: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) restarts: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) message: Option<String>,
    /// What it told a gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) load: Option<GangReport>,
}

impl Overview {
    /// `deployments` and `pools` as the API server has them.
    pub(super) fn of_cluster(
        deployments: &[Value],
        pools: &[Value],
        gateway: Result<FleetReport, String>,
    ) -> Self {
        let (report, problem) = match gateway {
            Ok(report) => (Some(report), None),
            Err(problem) => (None, Some(problem)),
        };
        let loads: BTreeMap<&str, &GangReport> =
            report.iter().flat_map(|report| &report.gangs).map(|gang| (gang.id.as_str(), gang)).collect();
        let deployments = deployments.iter().map(|object| {
            let (namespace, name) = (text(object, "/metadata/namespace"), text(object, "/metadata/name"));
            let pools = pools.iter().filter(|pool| {
                text(pool, "/metadata/namespace") == namespace
                    && text(pool, "/spec/deploymentRef/name") == name
            });
            let served = names(object, &name);
            let models = report.iter().flat_map(|report| &report.models);
            Deployment {
                conditions: list(object, "/status/conditions").map(condition).collect(),
                pools: pools.map(|object| pool(object, &loads)).collect(),
                last_scale: object
                    .pointer("/status/lastScale")
                    .and_then(|scale| serde_json::from_value(scale.clone()).ok()),
                models: models.filter(|model| served.contains(&model.name)).cloned().collect(),
                namespace,
                name,
            }
        });
        Self { deployments: deployments.collect(), problem }
    }

    /// What one gateway alone knows.
    pub(super) fn of_gateway(report: FleetReport, name: Option<&str>) -> Self {
        let FleetReport { models, gangs, left_out, .. } = report;
        let wanted = models.into_iter().filter(|model| name.is_none_or(|name| model.name == name));
        let deployments = wanted.map(|model| {
            let mut pools: BTreeMap<&str, Pool> = BTreeMap::new();
            for gang in gangs.iter().filter(|gang| gang.models.contains(&model.name)) {
                let pool = pools.entry(&gang.role).or_default();
                pool.role.clone_from(&gang.role);
                pool.gangs.push(Gang {
                    id: gang.id.clone(),
                    phase: gang.phase.clone(),
                    revision: gang.revision.clone(),
                    restarts: None,
                    message: None,
                    load: Some(gang.clone()),
                });
            }
            Deployment {
                name: model.name.clone(),
                pools: pools.into_values().collect(),
                last_scale: model.last_scale.clone(),
                models: vec![model],
                ..Deployment::default()
            }
        });
        let problem = (left_out > 0).then(|| format!("{left_out} more gangs are not listed"));
        Self { deployments: deployments.collect(), problem }
    }
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn number(value: &Value, pointer: &str) -> Option<i64> {
    value.pointer(pointer).and_then(Value::as_i64)
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// What clients ask for: what the user says, or the object's name.
fn names(object: &Value, name: &str) -> Vec<String> {
    let given: Vec<String> =
        list(object, "/spec/model/servedNames").filter_map(|name| Some(name.as_str()?.to_owned())).collect();
    if given.is_empty() { vec![name.to_owned()] } else { given }
}

fn condition(value: &Value) -> Condition {
    Condition {
        kind: text(value, "/type"),
        status: text(value, "/status"),
        reason: text(value, "/reason"),
        message: text(value, "/message"),
    }
}

fn pool(object: &Value, loads: &BTreeMap<&str, &GangReport>) -> Pool {
    let gangs = list(object, "/status/gangs").map(|gang| {
        let id = text(gang, "/id");
        Gang {
            phase: text(gang, "/phase"),
            revision: text(gang, "/revision"),
            restarts: number(gang, "/restarts").filter(|restarts| *restarts > 0),
            message: gang.pointer("/message").and_then(Value::as_str).map(str::to_owned),
            load: loads.get(id.as_str()).map(|load| (*load).clone()),
            id,
        }
    });
    Pool {
        role: text(object, "/spec/role"),
        replicas: number(object, "/spec/replicas"),
        gangs: gangs.collect(),
    }
}
