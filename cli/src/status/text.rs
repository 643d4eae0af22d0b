//! The overview as text.

use std::fmt;

use herd_gateway::{GangReport, LastScale, ModelReport, Quantiles};

use super::overview::{Condition, Deployment, Gang, Overview, Pool};

impl fmt::Display for Overview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { deployments, problem } = self;
        if deployments.is_empty() {
            writeln!(f, "no LlamaDeployment")?;
        }
        for (number, deployment) in deployments.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            deployment.fmt(f)?;
        }
        match problem {
            Some(problem) => writeln!(f, "\n{problem}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Deployment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, name, conditions, pools, last_scale, models } = self;
        let place = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        let sizes: Vec<String> = pools.iter().map(size).collect();
        writeln!(f, "{place}{name}   {}", sizes.join(", "))?;
        for Condition { kind, status, reason, message } in conditions {
            // Those that say that all is well are no news, Ready apart.
            let usual =
                if matches!(kind.as_str(), "Degraded" | "Progressing" | "Paused") { "False" } else { "True" };
            if kind == "Ready" || status != usual {
                writeln!(f, "  {kind}={status} {reason}: {message}")?;
            }
        }
        for model in models {
            writeln!(f, "  {}", performance(model))?;
        }
        if let Some(scale) = last_scale {
            writeln!(f, "  {}", decision(scale))?;
        }
        table(f, pools)
    }
}

fn is_ready(gang: &Gang) -> bool {
    gang.phase.eq_ignore_ascii_case("ready")
}

fn size(pool: &Pool) -> String {
    let ready = pool.gangs.iter().filter(|gang| is_ready(gang)).count();
    let wanted = pool.replicas.map_or(pool.gangs.len() as i64, |replicas| replicas);
    format!("{} {ready}/{wanted}", pool.role)
}

fn performance(model: &ModelReport) -> String {
    let ModelReport {
        name,
        waiting_for_gang,
        requests_per_second,
        output_tokens_per_second,
        time_to_first_token,
        inter_token_latency,
        ..
    } = model;
    format!(
        "{name}: TTFT {}, ITL {}, {requests_per_second:.1} answers/s, {output_tokens_per_second:.0} tokens/s, \
         {waiting_for_gang} waiting for a gang",
        times(*time_to_first_token),
        times(*inter_token_latency)
    )
}

fn times(quantiles: Option<Quantiles>) -> String {
    match quantiles {
        Some(Quantiles { p50, p99 }) => format!("p50 {:.0} ms p99 {:.0} ms", p50 * 1000.0, p99 * 1000.0),
        None => "-".to_owned(),
    }
}

fn decision(scale: &LastScale) -> String {
    let LastScale { time, prefill, decode, unified, reason } = scale;
    let sizes = [("prefill", prefill), ("decode", decode), ("unified", unified)]
        .into_iter()
        .filter_map(|(role, size)| Some(format!("{role} {}", size.as_ref()?)));
    format!("scaled {time}: {}: {reason}", sizes.collect::<Vec<_>>().join(", "))
}

const HEAD: [&str; 9] =
    ["POOL", "GANG", "PHASE", "KV", "RUNNING", "WAITING", "RANKS", "REVISION", "RESTARTS"];

fn table(f: &mut fmt::Formatter<'_>, pools: &[Pool]) -> fmt::Result {
    let gangs = pools.iter().flat_map(|pool| pool.gangs.iter().map(move |gang| (pool, gang)));
    let rows: Vec<([String; 9], Option<&String>)> =
        gangs.map(|(pool, gang)| (row(pool, gang), gang.message.as_ref())).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let width = |column: usize| {
        let cells = rows.iter().map(|(cells, _)| cells[column].chars().count());
        cells.chain([HEAD[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; 9] = std::array::from_fn(width);
    let line = |cells: &[&str]| {
        let cells: Vec<String> =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("  {}", cells.join("  ").trim_end())
    };
    writeln!(f, "{}", line(&HEAD))?;
    for (cells, message) in &rows {
        writeln!(f, "{}", line(&cells.each_ref().map(String::as_str)))?;
        if let Some(message) = message {
            writeln!(f, "    {message}")?;
        }
    }
    Ok(())
}

fn row(pool: &Pool, gang: &Gang) -> [String; 9] {
    let Gang { id, phase, revision, restarts, message: _, load } = gang;
    let of_load = |say: &dyn Fn(&GangReport) -> String| load.as_ref().map_or_else(|| "-".to_owned(), say);
    let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    [
        pool.role.clone(),
        or_none(id),
        phase.clone(),
        of_load(&|load| match load.kv_blocks {
            0 => "-".to_owned(),
            blocks => format!("{} %", 100 * u64::from(load.kv_blocks_used) / u64::from(blocks)),
        }),
        of_load(&|load| load.running.to_string()),
        of_load(&|load| load.waiting.to_string()),
        of_load(&|load| load.ranks.to_string()),
        or_none(revision),
        restarts.map_or_else(|| "-".to_owned(), |restarts| restarts.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn objects() -> (Vec<Value>, Vec<Value>) {
        let deployment = json!({
            "metadata": {"namespace": "default", "name": "llama"},
            "spec": {"model": {"servedNames": ["llama-8b"]}},
            "status": {
                "conditions": [
                    {"type": "Ready", "status": "False", "reason": "GangsMissing", "message": "decode has 1 of 2"},
                    {"type": "Scheduled", "status": "True", "reason": "Scheduled", "message": ""},
                    {"type": "Degraded", "status": "True", "reason": "CrashLoop", "message": "a gang fails"},
                    {"type": "Progressing", "status": "False", "reason": "Settled", "message": "no news"},
                    {"type": "Paused", "status": "False", "reason": "NotPaused", "message": "no news"},
                ],
                "lastScale": {"time": "2026-11-25T10:00:00Z", "prefill": 1, "decode": 2, "reason": "KV use is 91 %"},
            },
        });
        let pool = |role: &str, gangs: Value| {
            json!({
                "metadata": {"namespace": "default", "name": format!("llama-{role}")},
                "spec": {"deploymentRef": {"name": "llama"}, "role": role, "replicas": gangs.as_array().unwrap().len()},
                "status": {"gangs": gangs},
            })
        };
        let other = json!({"metadata": {"namespace": "other", "name": "llama-decode"},
            "spec": {"deploymentRef": {"name": "llama"}, "role": "decode"}, "status": {"gangs": [{"id": "stranger"}]}});
        let failed = json!({"id": "bbb", "revision": "r1", "phase": "CrashLooping", "restarts": 3,
            "message": "cannot open the model"});
        let pools = vec![
            pool("decode", json!([{"id": "aaa", "revision": "r1", "phase": "Ready"}, failed])),
            pool("prefill", json!([{"id": "ccc", "revision": "r1", "phase": "Ready", "restarts": 0}])),
            other,
        ];
        (vec![deployment], pools)
    }

    fn gang(id: &str, role: &str, used: u32) -> GangReport {
        GangReport {
            id: id.to_owned(),
            models: vec!["llama-8b".to_owned()],
            role: role.to_owned(),
            phase: "ready".to_owned(),
            revision: "r1".to_owned(),
            epoch: "1".to_owned(),
            ranks: 8,
            kv_blocks: 200,
            kv_blocks_used: used,
            running: 5,
            waiting: 1,
            waiting_prompt_tokens: 100,
            max_sequences: 64,
        }
    }

    fn report() -> herd_gateway::FleetReport {
        let model = ModelReport {
            name: "llama-8b".to_owned(),
            digest: "sha256:0".to_owned(),
            context_length: 8192,
            waiting_for_gang: 2,
            requests_per_second: 1.25,
            output_tokens_per_second: 80.4,
            time_to_first_token: Some(Quantiles { p50: 0.12, p99: 0.3449 }),
            inter_token_latency: None,
            last_scale: None,
        };
        herd_gateway::FleetReport {
            version: "0.1.0".to_owned(),
            in_flight: 3,
            window_seconds: 60.0,
            models: vec![model],
            gangs: vec![gang("aaa", "decode", 182), gang("ccc", "prefill", 0)],
            left_out: 0,
        }
    }

    #[test]
    fn a_cluster_reads_like_this() {
        let (deployments, pools) = objects();
        let text = Overview::of_cluster(&deployments, &pools, Ok(report())).to_string();
        let expected = "\
default/llama   decode 1/2, prefill 1/1
  Ready=False GangsMissing: decode has 1 of 2
  Degraded=True CrashLoop: a gang fails
  llama-8b: TTFT p50 120 ms p99 345 ms, ITL -, 1.2 answers/s, 80 tokens/s, 2 waiting for a gang
  scaled 2026-11-25T10:00:00Z: prefill 1, decode 2: KV use is 91 %
  POOL     GANG  PHASE         KV    RUNNING  WAITING  RANKS  REVISION  RESTARTS
  decode   aaa   Ready         91 %  5        1        8      r1        -
  decode   bbb   CrashLooping  -     -        -        -      r1        3
    cannot open the model
  prefill  ccc   Ready         0 %   5        1        8      r1        -
";
        assert_eq!(text, expected);
    }

    #[test]
    fn without_the_gateway_the_rest_is_there_and_it_says_so() {
        let (deployments, pools) = objects();
        let away = Err("the gateway does not answer".to_owned());
        let overview = Overview::of_cluster(&deployments, &pools, away);
        let text = overview.to_string();
        assert!(text.contains("  decode   aaa   Ready         -   -  "), "{text}");
        assert!(text.ends_with("\n\nthe gateway does not answer\n"), "{text}");
        let json = serde_json::to_value(&overview).unwrap();
        assert_eq!(json["problem"], "the gateway does not answer");
        assert_eq!(json["deployments"][0]["pools"][0]["gangs"][1]["restarts"], 3);
        assert_eq!(json["deployments"][0]["last_scale"]["decode"], 2);
    }

    #[test]
    fn a_gateway_alone_tells_of_its_models() {
        let text = Overview::of_gateway(report(), None).to_string();
        assert!(text.starts_with("llama-8b   decode 1/1, prefill 1/1\n"), "{text}");
        assert!(
            text.contains("  prefill  ccc   ready  0 %   5        1        8      r1        -\n"),
            "{text}"
        );
        assert_eq!(Overview::of_gateway(report(), Some("other")).to_string(), "no LlamaDeployment\n");
        let long = herd_gateway::FleetReport { left_out: 3, ..report() };
        let text = Overview::of_gateway(long, None).to_string();
        assert!(text.ends_with("\n\n3 more gangs are not listed\n"), "{text}");
    }
}
