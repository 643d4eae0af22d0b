//! The fleet as Prometheus sees it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{eventually, get, with_fleet};
use serde_json::Value;

use crate::shared::deployed;

const WITHIN: Duration = Duration::from_mins(1);

#[test]
fn prometheus_finds_every_part() -> Result<()> {
    with_fleet(|fleet| {
        deployed(fleet)?;
        let service = fleet.kubectl().within("monitoring").get("service/prometheus")?;
        let address = format!("{}:9090", service["spec"]["clusterIP"].as_str().context("no cluster IP")?);
        eventually("all targets", WITHIN, || {
            let answer = get(&address, "/api/v1/query?query=up")?;
            let answer: Value = serde_json::from_str(&answer).context("Prometheus's answer")?;
            let up = answer["data"]["result"].as_array().context("no result")?;
            let of = |namespace: &str, pod: &str| {
                up.iter()
                    .filter(|one| {
                        one["metric"]["namespace"] == namespace
                            && one["metric"]["pod"].as_str().is_some_and(|name| name.starts_with(pod))
                            && one["value"][1] == "1"
                    })
                    .count()
            };
            let seen = (
                of("herd-system", "herd-operator-"),
                of("herd-system", "herd-gateway-"),
                of("e2e-shared", "smollm2-"),
            );
            ensure!(seen == (1, 1, 2), "{seen:?}: {up:?}");
            Ok(())
        })
    })
}
