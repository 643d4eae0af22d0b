//! One deployment that most tests use, and the answers it has to give.

use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use herd_e2e::{Answer, Fleet, Kubectl, Serve};
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::{Chat, ChatMessage, GenerateRequest, Sampling};

use crate::objects::{apart, ready};

/// The deployment's name, and the one its model is served under.
pub(crate) const NAME: &str = "smollm2";

/// Its namespace, once it is ready.
pub(crate) fn deployed(fleet: &Fleet) -> Result<&'static Kubectl> {
    static DEPLOYED: OnceLock<Result<Kubectl, String>> = OnceLock::new();
    let deploy = || -> Result<Kubectl> {
        // It stays for the next test, and goes with the cluster.
        let kubectl = fleet.namespace("e2e-shared")?.keep();
        kubectl.apply(&apart(NAME))?;
        ready(&kubectl, NAME)?;
        Ok(kubectl)
    };
    DEPLOYED
        .get_or_init(|| deploy().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

/// A request, and what it has to be answered.
pub(crate) type Golden = (GenerateRequest, Answer);

/// Requests of every kind, and what `herd serve` answers to each: one gang of three ranks, no cluster.
pub(crate) fn golden(fleet: &Fleet) -> Result<&'static [Golden]> {
    static GOLDEN: OnceLock<Result<Vec<Golden>, String>> = OnceLock::new();
    answered(fleet, &GOLDEN, requests)
}

/// Streams that take seconds, so that a gang that goes has some.
pub(crate) fn golden_streams(fleet: &Fleet) -> Result<&'static [Golden]> {
    static GOLDEN: OnceLock<Result<Vec<Golden>, String>> = OnceLock::new();
    answered(fleet, &GOLDEN, streams)
}

fn answered(
    fleet: &Fleet,
    once: &'static OnceLock<Result<Vec<Golden>, String>>,
    requests: fn() -> Vec<GenerateRequest>,
) -> Result<&'static [Golden]> {
    let ask = || -> Result<Vec<Golden>> {
        let environment = fleet.environment();
        let model = environment.models.join("smollm2-135m-fbgemm-fp8");
        let serve = Serve::start(&environment.herd, &model, NAME, &["--tensor", "3", "--unified", "1"])?;
        requests()
            .into_iter()
            .map(|request| Ok((request.clone(), fleet.ask_at(serve.grpc(), &request)?)))
            .collect()
    };
    let golden = once.get_or_init(|| ask().map_err(|error| format!("{error:#}")));
    golden.as_deref().map_err(|error| anyhow!("{error}"))
}

/// Asks the gateway for all of them.
pub(crate) fn answers_right(fleet: &Fleet) -> Result<()> {
    for (request, expected) in golden(fleet)? {
        assert_eq!(fleet.ask(request)?, *expected, "{request:?}");
    }
    Ok(())
}

fn sampling(max_tokens: u32, temperature: f32, seed: u64) -> Sampling {
    Sampling {
        max_tokens: Some(max_tokens),
        temperature: Some(temperature),
        seed: Some(seed),
        ..Sampling::default()
    }
}

fn request(input: Input, n: u32, sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        model: NAME.to_owned(),
        input: Some(input),
        sampling: Some(sampling),
        n,
        ..GenerateRequest::default()
    }
}

fn requests() -> Vec<GenerateRequest> {
    let text = |text: &str| Input::Text(text.to_owned());
    // Longer than a step, so that it is computed in pieces.
    let long = "The sea was calm, and the ship went on to the north. ".repeat(60);
    vec![
        request(Input::Chat(question("What is the capital of Japan?")), 1, sampling(24, 0.0, 0)),
        request(text("The sea"), 1, sampling(48, 0.8, 7)),
        request(text(&long), 1, sampling(16, 0.0, 0)),
        request(text("Once upon a time"), 2, sampling(32, 1.0, 11)),
    ]
}

fn streams() -> Vec<GenerateRequest> {
    let stream = |seed| {
        let sampling = Sampling { ignore_eos: true, ..sampling(160, 0.8, seed) };
        request(Input::Text("Once upon a time, by the sea,".to_owned()), 1, sampling)
    };
    (1..=8).map(stream).collect()
}

fn question(content: &str) -> Chat {
    Chat { messages: vec![ChatMessage { role: "user".to_owned(), content: content.to_owned() }] }
}
