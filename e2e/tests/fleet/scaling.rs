//! Gangs come and go under load, and nobody notices.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Fleet, Kubectl, eventually, get, metric, with_fleet};

use crate::objects::{pods, settled, wait_for};
use crate::shared::{answers_right, deployed, golden_streams};

const WITHIN: Duration = Duration::from_mins(2);

fn scale(kubectl: &Kubectl, pool: &str, replicas: i64) -> Result<()> {
    kubectl.run(&["scale", "llamapool", pool, &format!("--replicas={replicas}")]).map(drop)
}

/// One gang, two, and one again, each under streams that are compared with what they have to be.
fn up_and_down(fleet: &Fleet, pool: &str, busy: impl Fn(&Kubectl) -> Result<()>) -> Result<()> {
    let kubectl = deployed(fleet)?;
    let golden = golden_streams(fleet)?;
    let mut traffic = fleet.traffic(golden.iter().cloned());
    for gangs in [2, 1] {
        scale(kubectl, pool, gangs)?;
        settled(kubectl, pool, gangs)?;
        let until = traffic.answers()? + golden.len();
        eventually("more answers", WITHIN, || {
            let answers = traffic.answers()?;
            ensure!(answers >= until, "{answers} of {until}");
            busy(kubectl)
        })?;
    }
    let answers = traffic.finish()?;
    println!("{answers} streams, none broken");
    Ok(())
}

#[test]
fn decode_gangs_come_and_go_under_streams() -> Result<()> {
    with_fleet(|fleet| {
        // The gang that goes has streams: else nothing could break.
        up_and_down(fleet, "smollm2-decode", |kubectl| {
            for pod in kubectl.list("pods", "herd.dev/deployment=smollm2,herd.dev/role=decode")? {
                let ip = pod["status"]["podIP"].as_str().context("a pod without an address")?;
                let running = metric(&get(&format!("{ip}:9001"), "/metrics")?, "herd_requests_running", "");
                ensure!(running >= Some(1.0), "{ip} runs {running:?} requests");
            }
            Ok(())
        })
    })
}

#[test]
fn prefill_gangs_come_and_go_under_streams() -> Result<()> {
    with_fleet(|fleet| up_and_down(fleet, "smollm2-prefill", |_| Ok(())))
}

#[test]
fn replicas_out_of_bounds_are_clamped_with_a_condition() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        scale(kubectl, "smollm2-prefill", 9)?;
        let object = "llamapool/smollm2-prefill";
        let message = wait_for(kubectl, object, "ScalingLimited", "True", Some("TooManyReplicas"))?;
        ensure!(message.contains("maxReplicas 2"), "{message}");
        settled(kubectl, "smollm2-prefill", 2)?;
        scale(kubectl, "smollm2-prefill", 1)?;
        settled(kubectl, "smollm2-prefill", 1)?;
        wait_for(kubectl, object, "ScalingLimited", "False", None).map(drop)
    })
}

#[test]
fn a_deleted_decode_pod_comes_back() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        let selector = "herd.dev/deployment=smollm2,herd.dev/role=decode";
        let before = pods(kubectl, selector)?;
        ensure!(before.len() == 1, "{before:?}");
        kubectl.run(&["delete", "pod", &before[0].0])?;
        settled(kubectl, "smollm2-decode", 1)?;
        let after = pods(kubectl, selector)?;
        ensure!(after.len() == 1 && after[0].0 != before[0].0, "{before:?} became {after:?}");
        answers_right(fleet)
    })
}
