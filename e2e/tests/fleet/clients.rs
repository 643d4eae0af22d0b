//! The clients that people have.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Table, run, with_fleet};
use serde_json::Value;

use crate::shared::{NAME, answers_right, deployed};

const WITHIN: Duration = Duration::from_mins(2);

const OPENAI: &str = r#"
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
stream = client.chat.completions.create(
    model="smollm2", temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True},
    messages=[{"role": "user", "content": "What is the capital of Japan?"}])
text, chunks, usage = "", 0, None
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        chunks += 1
completion = client.completions.create(model="smollm2", prompt="The sea", max_tokens=4, temperature=0, logprobs=2)
print(json.dumps({
    "text": text, "chunks": chunks, "completion_tokens": usage.completion_tokens,
    "models": [model.id for model in client.models.list()],
    "logprobs": len(completion.choices[0].logprobs.token_logprobs)}))
"#;

#[test]
fn the_answers_are_those_of_herd_serve() -> Result<()> {
    with_fleet(|fleet| {
        deployed(fleet)?;
        answers_right(fleet)
    })
}

#[test]
fn the_openai_client_streams_a_chat() -> Result<()> {
    with_fleet(|fleet| {
        deployed(fleet)?;
        let mut python = Command::new(&fleet.environment().python);
        python.args(["-c", OPENAI]).arg(format!("http://{}/v1", fleet.http()));
        let out = run(&mut python, "", WITHIN)?.checked()?;
        let said: Value = serde_json::from_str(&out).with_context(|| out.clone())?;
        ensure!(said["text"].as_str().is_some_and(|text| text.contains("Tokyo")), "{said}");
        ensure!(said["chunks"].as_i64() > Some(3) && said["completion_tokens"].as_i64() > Some(3), "{said}");
        ensure!(said["models"].as_array().is_some_and(|models| models.contains(&NAME.into())), "{said}");
        ensure!(said["logprobs"] == 4, "{said}");
        Ok(())
    })
}

#[test]
fn grpcurl_lists_and_calls() -> Result<()> {
    with_fleet(|fleet| {
        deployed(fleet)?;
        let grpcurl = |arguments: &[&str]| {
            let mut command = Command::new(&fleet.environment().grpcurl);
            run(command.arg("-plaintext").args(arguments), "", WITHIN)?.checked()
        };
        let services = grpcurl(&[fleet.grpc(), "list"])?;
        ensure!(services.lines().any(|service| service == "herd.v1.Inference"), "{services}");
        let models = grpcurl(&[fleet.grpc(), "herd.v1.Inference/ListModels"])?;
        ensure!(models.contains("\"smollm2\""), "{models}");
        let request = r#"{"model": "smollm2", "sampling": {"maxTokens": 24, "temperature": 0},
            "chat": {"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}}"#;
        let events = grpcurl(&["-d", request, fleet.grpc(), "herd.v1.Inference/Generate"])?;
        ensure!(events.contains("Tokyo") && events.contains("\"finished\""), "{events}");
        Ok(())
    })
}

#[test]
fn kubectl_shows_whether_it_is_up_how_many_and_since_when() -> Result<()> {
    with_fleet(|fleet| {
        let kubectl = deployed(fleet)?;
        let table = Table::parse(&kubectl.run(&["get", "llamadeployments"])?);
        let cell = |header| table.cell(NAME, header);
        ensure!(cell("READY") == Some("True") && cell("REASON") == Some("AllGangsReady"), "{table:?}");
        ensure!(cell("GANGS") == Some("prefill 1/1, decode 1/1"), "{table:?}");
        ensure!(cell("SINCE").is_some_and(|since| !since.is_empty()) && cell("AGE").is_some(), "{table:?}");
        let table = Table::parse(&kubectl.run(&["get", "llamapools"])?);
        let cell = |header| table.cell("smollm2-decode", header);
        ensure!(
            (cell("ROLE"), cell("READY"), cell("DESIRED")) == (Some("decode"), Some("1"), Some("1")),
            "{table:?}"
        );
        Ok(())
    })
}

#[test]
fn pods_of_gangs_have_no_privileges() -> Result<()> {
    with_fleet(|fleet| {
        // Its namespace enforces the standard "restricted"; what that standard does not ask for is looked at here.
        for pod in deployed(fleet)?.list("pods", "herd.dev/deployment=smollm2")? {
            let (spec, container) = (&pod["spec"], &pod["spec"]["containers"][0]["securityContext"]);
            ensure!(container["readOnlyRootFilesystem"] == true, "{container}");
            ensure!(
                spec["automountServiceAccountToken"] == false
                    && spec["securityContext"]["runAsUser"] == 65532,
                "{spec}"
            );
        }
        Ok(())
    })
}
