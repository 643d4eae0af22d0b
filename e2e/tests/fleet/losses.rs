//! Gangs are killed under streams, and nobody notices.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use herd_e2e::{Fleet, Kubectl, eventually, get, metric, with_fleet};

use crate::objects::settled;
use crate::shared::{deployed, golden_streams};

const KILLS: usize = 10;
const SEED: u64 = 1;
const WITHIN: Duration = Duration::from_mins(3);

/// One that serves streams now.
struct Victim {
    gang: String,
    pod: String,
    http: String,
}

fn victim(kubectl: &Kubectl, role: &str) -> Result<Victim> {
    let pods = kubectl.list("pods", &format!("herd.dev/deployment=smollm2,herd.dev/role={role}"))?;
    let pod = pods.iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).context("no pod")?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    Ok(Victim {
        gang: text(&pod["metadata"]["labels"]["herd.dev/gang"]).context("a pod of no gang")?,
        pod: text(&pod["metadata"]["name"]).context("a pod without a name")?,
        http: format!("{}:9001", text(&pod["status"]["podIP"]).context("a pod without an address")?),
    })
}

/// `kill -9` of the worker itself: the local cluster's processes are the machine's too.
fn kill_process(gang: &str) -> Result<()> {
    let variable = format!("HERD_GANG_ID={gang}");
    for entry in fs::read_dir("/proc").context("read /proc")? {
        let process = entry.context("read /proc")?.path();
        // Others end while they are looked at.
        let Ok(name) = fs::read_to_string(process.join("comm")) else { continue };
        let Ok(environment) = fs::read(process.join("environ")) else { continue };
        if name.trim_end() == "herd-worker"
            && environment.split(|byte| *byte == 0).any(|one| one == variable.as_bytes())
        {
            let id = process.file_name().unwrap_or_default();
            // The shell's own: the program is not on every machine.
            let kill = format!("kill -9 {}", id.display());
            let killed = Command::new("sh").args(["-c", &kill]).status().context("run sh")?;
            ensure!(killed.success(), "{kill}: {killed}");
            return Ok(());
        }
    }
    bail!("no process of gang {gang}")
}

fn roll(n: usize, of: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (SEED, n).hash(&mut hasher);
    hasher.finish() % of
}

fn retries(fleet: &Fleet) -> Result<f64> {
    Ok(metric(&get(fleet.http(), "/metrics")?, "herd_gateway_retries_total", "").unwrap_or(0.0))
}

#[test]
fn streams_outlive_gangs_that_are_killed() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        let golden = golden_streams(fleet)?;
        ensure!(golden.len() == 8, "{} streams", golden.len());
        let before = retries(fleet)?;
        let mut traffic = fleet.traffic(golden.iter().cloned());
        for n in 0..KILLS {
            let role = if roll(n, 3) == 0 { "prefill" } else { "decode" };
            let Victim { gang, pod, http } = victim(kubectl, role)?;
            eventually("streams to be in the middle", WITHIN, || {
                traffic.answers()?;
                if role == "prefill" {
                    return Ok(());
                }
                let page = get(&http, "/metrics")?;
                let (running, sampled) = (
                    metric(&page, "herd_requests_running", ""),
                    metric(&page, "herd_output_tokens_total", ""),
                );
                ensure!(running >= Some(4.0) && sampled >= Some(8.0), "{running:?} run, {sampled:?} tokens");
                Ok(())
            })?;
            if roll(n, 2) == 0 {
                println!("{n}: kill -9 of the {role} gang {gang}");
                kill_process(&gang)?;
            } else {
                println!("{n}: pod {pod} of the {role} gang is deleted");
                kubectl.run(&["delete", "pod", &pod, "--force", "--grace-period=0"])?;
            }
            // Not before it is seen to be lost: the next one must be another.
            eventually("the loss to be seen", WITHIN, || {
                traffic.answers()?;
                let now = victim(kubectl, role)?;
                let sampled = get(&now.http, "/metrics").map(|page| metric(&page, "herd_steps_total", ""));
                ensure!(now.gang != gang || sampled.is_err(), "{gang} is still there");
                Ok(())
            })?;
            settled(kubectl, &format!("smollm2-{role}"), 1)?;
        }
        let answers = traffic.finish()?;
        let retries = retries(fleet)? - before;
        println!("{answers} streams, none broken; {retries} attempts went on elsewhere");
        ensure!(answers >= golden.len() && retries >= 8.0, "{answers} answers, {retries} retries");
        Ok(())
    })
}
