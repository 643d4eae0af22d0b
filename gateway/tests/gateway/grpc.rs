//! `herd.v1.Inference`.

use herd_proto::v1::generate_event::Event;
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::*;
use tonic::Code;

use crate::support::scripted::{leader, says};
use crate::support::{gateway, soon, text_model};

fn request(input: Input) -> GenerateRequest {
    GenerateRequest { model: "tiny".to_owned(), input: Some(input), ..GenerateRequest::default() }
}

pub(crate) fn text(text: &str) -> GenerateRequest {
    request(Input::Text(text.to_owned()))
}

async fn events(stream: tonic::Streaming<GenerateEvent>) -> Result<Vec<GenerateEvent>, tonic::Status> {
    let mut stream = stream;
    let mut events = Vec::new();
    while let Some(event) = soon(stream.message()).await? {
        events.push(event);
    }
    Ok(events)
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_in_order_with_text_in_step_with_ids() {
    let worker = leader(says("Hello, world.")).start().await;
    let running = gateway(&[&worker.address]).await;
    let mut client = running.grpc().await;
    let sampling = Sampling { seed: Some(11), logprobs: Some(1), ..Sampling::default() };
    let asked =
        GenerateRequest { sampling: Some(sampling), n: 2, request_id: "mine".to_owned(), ..text("hello") };
    let response = client.generate(asked).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine");
    let events = events(response.into_inner()).await.unwrap();
    let mut expected = text_model().encode("Hello, world.", false).unwrap();
    expected.push(1016);
    for choice in 0..2 {
        let mut of: Vec<_> = events.iter().filter(|event| event.choice == choice).collect();
        let Some(Event::Started(started)) = &of.remove(0).event else { panic!("{events:?}") };
        assert_eq!((started.seed, started.model_digest.as_str()), (11, "digest"));
        let last = of.pop().unwrap();
        let Some(Event::Finished(finished)) = &last.event else { panic!("{events:?}") };
        assert_eq!(finished.reason(), finished::Reason::Stop);
        let usage = finished.usage.unwrap();
        assert_eq!(usage.completion_tokens as usize, expected.len());
        assert_eq!(usage.prompt_tokens as usize, worker.calls()[0].prompt.len());
        assert_eq!(last.position as usize, expected.len());
        let (mut ids, mut said) = (Vec::new(), String::new());
        for event in of {
            let Some(Event::Delta(delta)) = &event.event else { panic!("{events:?}") };
            assert_eq!(event.position as usize, ids.len());
            assert_eq!(delta.logprobs.len(), delta.token_ids.len());
            for (logprob, id) in delta.logprobs.iter().zip(&delta.token_ids) {
                assert_eq!(logprob.token_id, *id);
                assert_eq!(logprob.top.len(), 1);
                assert_eq!(logprob.bytes, text_model().token_text(*id).1);
            }
            ids.extend(&delta.token_ids);
            said.push_str(&delta.text);
        }
        assert_eq!((ids, said.as_str()), (expected.clone(), "Hello, world."));
    }
    assert_eq!(worker.calls()[0].context.as_ref().unwrap().request_id, "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn text_tokens_and_chat_reach_the_gang() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let mut client = running.grpc().await;
    let chat = Chat { messages: vec![ChatMessage { role: "user".to_owned(), content: "hi".to_owned() }] };
    for input in
        [Input::Text("hi".to_owned()), Input::Tokens(TokenIds { ids: vec![9, 8] }), Input::Chat(chat)]
    {
        events(client.generate(request(input)).await.unwrap().into_inner()).await.unwrap();
    }
    let chat = serde_json::json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    running.post("/v1/chat/completions", &chat).await;
    let prompts: Vec<_> = worker.calls().into_iter().map(|call| call.prompt).collect();
    assert_eq!(prompts[0], text_model().encode("hi", true).unwrap());
    assert_eq!(prompts[1], [9, 8]);
    assert_eq!(prompts[2], prompts[3], "both doors render alike");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_name() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let mut client = running.grpc().await;
    let with = |sampling: Sampling| GenerateRequest { sampling: Some(sampling), ..text("x") };
    let named = |model: &str| GenerateRequest { model: model.to_owned(), ..text("x") };
    let stops = |stop: &str| with(Sampling { stop: vec![stop.to_owned()], ..Sampling::default() });
    let robot = Chat { messages: vec![ChatMessage { role: "robot".to_owned(), content: String::new() }] };
    let cases = [
        (named(""), Code::InvalidArgument, "model is empty"),
        (named("other"), Code::NotFound, "\"other\" does not exist; this gateway serves tiny"),
        (GenerateRequest { input: None, ..text("") }, Code::InvalidArgument, "input is missing"),
        (request(Input::Tokens(TokenIds { ids: vec![] })), Code::InvalidArgument, "input has no tokens"),
        (request(Input::Tokens(TokenIds { ids: vec![5000] })), Code::InvalidArgument, "input: token 5000"),
        (
            request(Input::Tokens(TokenIds { ids: vec![5; 512] })),
            Code::InvalidArgument,
            "input has 512 tokens",
        ),
        (request(Input::Chat(Chat { messages: vec![] })), Code::InvalidArgument, "chat.messages"),
        (request(Input::Chat(robot)), Code::InvalidArgument, "chat.messages[0].role"),
        (
            with(Sampling { max_tokens: Some(0), ..Sampling::default() }),
            Code::InvalidArgument,
            "sampling.max_tokens",
        ),
        (
            with(Sampling { max_tokens: Some(512), ..Sampling::default() }),
            Code::InvalidArgument,
            "sampling.max_tokens",
        ),
        (
            with(Sampling { temperature: Some(-1.0), ..Sampling::default() }),
            Code::InvalidArgument,
            "sampling.temperature",
        ),
        (
            with(Sampling { temperature: Some(f32::NAN), ..Sampling::default() }),
            Code::InvalidArgument,
            "temperature",
        ),
        (with(Sampling { top_p: Some(0.0), ..Sampling::default() }), Code::InvalidArgument, "sampling.top_p"),
        (
            with(Sampling { logprobs: Some(21), ..Sampling::default() }),
            Code::InvalidArgument,
            "sampling.logprobs",
        ),
        (stops(""), Code::InvalidArgument, "sampling.stop"),
        (
            with(Sampling { presence_penalty: f32::NAN, ..Sampling::default() }),
            Code::InvalidArgument,
            "sampling.presence_penalty",
        ),
        (
            with(Sampling { logit_bias: [(5000, 1.0)].into(), ..Sampling::default() }),
            Code::InvalidArgument,
            "sampling.logit_bias: token 5000",
        ),
        (GenerateRequest { n: 129, ..text("x") }, Code::InvalidArgument, "n must be"),
    ];
    for (request, code, message) in cases {
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(message), "{status:?} lacks {message:?}");
        assert!(status.metadata().contains_key("x-request-id"));
    }
    assert!(worker.calls().is_empty(), "none reached the gang");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let models = running.grpc().await.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let expected =
        Model { name: "tiny".to_owned(), context_length: 512, digest: "digest".to_owned(), ready_gangs: 1 };
    assert_eq!(models, [expected]);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_are_served() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

    let running = gateway::<&str>(&[]).await;
    let address = format!("http://{}", running.gateway.addresses().grpc);
    let channel = tonic::transport::Endpoint::new(address).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    for service in ["", "herd.v1.Inference"] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        let status = soon(health.check(request)).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service:?}");
    }
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers =
        reflection.server_reflection_info(futures::stream::iter([list])).await.unwrap().into_inner();
    let answer = soon(answers.message()).await.unwrap();
    let Some(ServerReflectionResponse {
        message_response: Some(MessageResponse::ListServicesResponse(services)),
        ..
    }) = answer
    else {
        panic!("{answer:?}")
    };
    assert!(services.service.iter().any(|service| service.name == "herd.v1.Inference"), "{services:?}");
    assert!(services.service.iter().all(|service| service.name != "herd.internal.v1.Worker"), "{services:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_of_the_client_ends_the_work() {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let receiver = std::sync::Mutex::new(Some(receiver));
    let worker = leader(move |_| Ok(receiver.lock().unwrap().take().unwrap())).start().await;
    let running = gateway(&[&worker.address]).await;
    let mut client = running.grpc().await;
    let mut request = tonic::Request::new(text("x"));
    request.set_timeout(std::time::Duration::from_millis(50));
    let status = soon(client.generate(request)).await.unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    soon(sender.closed()).await;
}
