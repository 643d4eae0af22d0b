//! `herd bench` and `herd status`, from outside, against a fleet on the fake backend.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "this is how a test fails")]

use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use herd_engine::{FakeControl, FakeOptions};
use herd_gateway::{FixedFleet, FleetReport, GangEndpoint, Gateway, GatewayOptions, ReservedPort};
use herd_worker::{Backend, FakeBackend, Role, Worker, WorkerOptions};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

/// Much longer than anything here takes, also on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("this should have come to an end")
}

/// A gateway in front of workers that serve `tiny`.
struct Fleet {
    gateway: Gateway,
    _workers: Vec<Worker>,
    controls: Vec<FakeControl>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.controls.iter().for_each(FakeControl::open);
    }
}

impl Fleet {
    async fn start(roles: &[Role]) -> Self {
        let (mut workers, mut controls) = (Vec::new(), Vec::new());
        let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31/tiny-llama31-bf16");
        for &role in roles {
            let options =
                FakeOptions { vocab_size: 1024, unlikely: (1015..1024).collect(), ..FakeOptions::default() };
            let backend = FakeBackend::new(options, 4096).with_bundle(&bundle);
            controls.push(backend.control());
            let options = WorkerOptions { role, ..WorkerOptions::loopback(Backend::Fake(Box::new(backend))) };
            workers.push(Worker::start(options).await.unwrap());
        }
        let gang = |worker: &Worker| GangEndpoint {
            models: vec!["tiny".to_owned()],
            leader: worker.endpoint().to_string(),
        };
        let fleet = Arc::new(FixedFleet::new(workers.iter().map(gang).collect()));
        let any = "127.0.0.1:0".parse().unwrap();
        let (http, grpc) = (ReservedPort::reserve(any).unwrap(), ReservedPort::reserve(any).unwrap());
        let mut options = GatewayOptions::new(fleet, http, grpc);
        options.ready_within = Some(PATIENCE);
        Self { gateway: Gateway::start(options).await.unwrap(), _workers: workers, controls }
    }

    fn url(&self) -> String {
        format!("http://{}", self.gateway.addresses().http)
    }

    async fn report(&self) -> FleetReport {
        let mut stream = TcpStream::connect(self.gateway.addresses().http).await.unwrap();
        stream
            .write_all(b"GET /fleet.json HTTP/1.1\r\nhost: herd\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }
}

fn herd(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_herd"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// What it prints, and whether it ended well.
async fn run(command: &mut Command) -> (bool, String, String) {
    let output = soon(command.output()).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bench_counts_what_it_asked_and_got() {
    let fleet = Fleet::start(&[Role::Unified]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bench.json");
    for load in [["--rate", "200"], ["--concurrency", "4"]] {
        let mut bench = herd(&["bench", "--url", &fleet.url(), "--requests", "20", "--prompt-tokens", "30"]);
        bench.args(load).args(["--max-tokens", "7", "--json"]).arg(&file);
        let (well, out, errors) = run(&mut bench).await;
        assert!(well, "{errors}");
        assert!(out.contains("20 of 20 requests answered"), "{out}");
        let json: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!(json["setup"]["model"], "tiny");
        assert_eq!(json["requests"], json!({"sent": 20, "answered": 20, "errors": {}}));
        assert_eq!(json["tokens"], json!({"prompt": 20 * 30, "output": 20 * 7}));
        for times in ["time_to_first_token_seconds", "request_seconds", "time_per_output_token_seconds"] {
            let times = &json[times];
            assert_eq!(times["count"], 20, "{json}");
            assert!(
                times["p50"].as_f64() > Some(0.0) && times["p50"].as_f64() <= times["p99"].as_f64(),
                "{json}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arrivals_of_an_open_loop_do_not_wait_for_answers() {
    let fleet = Fleet::start(&[Role::Unified]).await;
    fleet.controls[0].close();
    let url = fleet.url();
    let mut bench = herd(&["bench", "--url", &url, "--model", "tiny", "--rate", "200", "--requests", "40"]);
    bench.args(["--prompt-tokens", "5", "--max-tokens", "3"]);
    let arrive = async {
        // Nothing is answered, and all are there.
        soon(async { while fleet.report().await.in_flight < 40 {} }).await;
        fleet.controls[0].open();
    };
    let ((well, out, errors), ()) = tokio::join!(run(&mut bench), arrive);
    assert!(well && out.contains("40 of 40 requests answered"), "{out}{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_loop_has_so_many_requests_and_no_more() {
    let fleet = Fleet::start(&[Role::Unified]).await;
    fleet.controls[0].close();
    let url = fleet.url();
    let mut bench = herd(&["bench", "--url", &url, "--concurrency", "3", "--requests", "9"]);
    bench.args(["--prompt-tokens", "5", "--max-tokens", "3"]);
    let watch = async {
        soon(async { while fleet.report().await.in_flight < 3 {} }).await;
        // A step later there are no more: who waits for room has not been sent.
        fleet.controls[0].pass().await;
        assert_eq!(fleet.report().await.in_flight, 3);
        fleet.controls[0].open();
    };
    let ((well, out, errors), ()) = tokio::join!(run(&mut bench), watch);
    assert!(well && out.contains("9 of 9 requests answered"), "{out}{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_counted_by_kind() {
    let fleet = Fleet::start(&[Role::Unified]).await;
    let bench = ["bench", "--url", &fleet.url(), "--model", "none", "--rate", "500", "--requests", "4"];
    let (well, out, errors) = run(&mut herd(&bench)).await;
    assert!(!well && errors.contains("no request was answered"), "{errors}");
    assert!(out.contains("0 of 4 requests answered") && out.contains("  4 x status 404\n"), "{out}");
    let nobody = ["bench", "--url", "http://127.0.0.1:1", "--model", "m", "--rate", "500", "--requests", "2"];
    let (_, out, _) = run(&mut herd(&nobody)).await;
    assert!(out.contains("  2 x no connection\n"), "{out}");
}

/// What an OpenAI server was asked, and how each model answers: `cut` without its end, `failing` with an error in the
/// stream, `silent` never.
#[derive(Clone, Default)]
struct OpenAi(Arc<Mutex<Vec<Value>>>);

async fn complete(State(asked): State<OpenAi>, body: String) -> String {
    let body: Value = serde_json::from_str(&body).unwrap();
    let model = body["model"].as_str().unwrap().to_owned();
    asked.0.lock().unwrap().push(body);
    let token = "data: {\"choices\": [{\"text\": \"a\", \"finish_reason\": null}]}\n\n".repeat(3);
    let usage = "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 4, \"completion_tokens\": 3}}\n\n";
    match model.as_str() {
        "cut" => token,
        "failing" => format!("{token}data: {{\"error\": {{\"message\": \"gone\"}}}}\n\ndata: [DONE]\n\n"),
        "silent" => std::future::pending().await,
        _ => format!("{token}{usage}data: [DONE]\n\n"),
    }
}

impl OpenAi {
    async fn start() -> (Self, String) {
        let asked = Self::default();
        let url = serve(Router::new().fallback(complete).with_state(asked.clone())).await;
        (asked, url)
    }

    /// What a bench prints, and the prompts that came.
    async fn bench(arguments: &[&str]) -> (String, Vec<Value>) {
        let (asked, url) = Self::start().await;
        let mut bench = herd(&["bench", "--url", &url, "--prompt-tokens", "4", "--max-tokens", "3"]);
        let (_, out, errors) = run(bench.args(arguments)).await;
        assert!(out.contains(" requests answered in "), "{out}{errors}");
        let prompts = asked.0.lock().unwrap().iter().map(|body| body["prompt"].clone()).collect();
        (out, prompts)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_or_fails_or_never_comes_is_no_answer() {
    for (model, kind) in [("cut", "broken stream"), ("failing", "error in the stream"), ("silent", "timeout")]
    {
        let arguments = ["--model", model, "--rate", "500", "--requests", "3", "--timeout", "1"];
        let (out, _) = OpenAi::bench(&arguments).await;
        assert!(
            out.starts_with(&format!("{model} at ")) && out.contains("0 of 3 requests answered"),
            "{out}"
        );
        assert!(out.contains(&format!("  3 x {kind}\n")), "{out}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_not_alike_and_a_seed_asks_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bench.json").display().to_string();
    let arguments =
        |seed| ["--model", "m", "--concurrency", "1", "--requests", "5", "--json", &file, "--seed", seed];
    let (_, prompts) = OpenAi::bench(&arguments("1")).await;
    for (number, prompt) in prompts.iter().enumerate() {
        assert_eq!(prompt.as_array().unwrap().len(), 4);
        assert!(!prompts[..number].contains(prompt), "{prompts:?}");
    }
    // Three parts have two times between them.
    let json: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(json["inter_token_latency_seconds"]["count"], 5 * 2);
    assert_eq!(OpenAi::bench(&arguments("1")).await.1, prompts);
    assert_ne!(OpenAi::bench(&arguments("2")).await.1, prompts);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duration_bounds_the_arrivals() {
    // The arrivals of a seed are always the same: of these, 47 are within the second.
    let arguments = ["--model", "m", "--rate", "40", "--duration", "1", "--seed", "3"];
    let (out, prompts) = OpenAi::bench(&arguments).await;
    assert!(out.contains(&format!("{0} of {0} requests answered", prompts.len())), "{out}");
    assert_eq!(prompts.len(), 47, "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_gateway_alone() {
    let fleet = Fleet::start(&[Role::Prefill, Role::Decode]).await;
    let (well, out, errors) = run(&mut herd(&["status", "--url", &fleet.url()])).await;
    assert!(well, "{errors}");
    assert!(out.starts_with("tiny   decode 1/1, prefill 1/1\n"), "{out}");
    let (_, json, _) = run(&mut herd(&["status", "tiny", "--url", &fleet.url(), "-o", "json"])).await;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["deployments"][0]["pools"][1]["gangs"][0]["load"]["kv_blocks"], 64);
}

/// As much of an API server as is asked.
#[derive(Clone)]
struct Api {
    /// None: the gateway is away.
    report: Option<FleetReport>,
}

async fn answer(State(api): State<Api>, uri: Uri) -> (StatusCode, axum::Json<Value>) {
    let deployment_in = |namespace: &str| {
        json!({
            "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
            "metadata": {"name": "tiny", "namespace": namespace},
            "spec": {"model": {"source": "oci://x/y:1"}},
            "status": {"lastScale": {"time": "2026-11-25T10:00:00Z", "decode": 1, "prefill": 1, "reason": "quiet"}},
        })
    };
    let pool = |role: &str, gang: &str| {
        json!({
            "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool",
            "metadata": {"name": format!("tiny-{role}"), "namespace": "models"},
            "spec": {"deploymentRef": {"name": "tiny"}, "role": role, "replicas": 1},
            "status": {"gangs": [{"id": gang, "revision": "r1", "phase": "Ready"}]},
        })
    };
    let id = |role: &str| {
        let gangs = api.report.iter().flat_map(|report| &report.gangs);
        gangs.clone().find(|gang| gang.role == role).map_or("gang", |gang| gang.id.as_str())
    };
    let list = |kind: &str, items: Value| {
        let list = json!({"apiVersion": "herd.dev/v1alpha1", "kind": kind, "metadata": {}, "items": items});
        (StatusCode::OK, axum::Json(list))
    };
    match (uri.path(), &api.report) {
        ("/apis/herd.dev/v1alpha1/namespaces/models/llamadeployments", _) => {
            list("LlamaDeploymentList", json!([deployment_in("models")]))
        }
        ("/apis/herd.dev/v1alpha1/namespaces/elsewhere/llamadeployments", _) => {
            list("LlamaDeploymentList", json!([deployment_in("elsewhere")]))
        }
        ("/apis/herd.dev/v1alpha1/llamadeployments", _) => {
            list("LlamaDeploymentList", json!([deployment_in("elsewhere"), deployment_in("models")]))
        }
        (
            "/apis/herd.dev/v1alpha1/namespaces/elsewhere/llamapools" | "/apis/herd.dev/v1alpha1/llamapools",
            _,
        ) => list("LlamaPoolList", json!([])),
        ("/apis/herd.dev/v1alpha1/namespaces/models/llamapools", _) => {
            let pools = json!([pool("decode", id("decode")), pool("prefill", id("prefill"))]);
            list("LlamaPoolList", pools)
        }
        ("/api/v1/namespaces/herd-system/services/http:herd-gateway:http/proxy/fleet.json", Some(report)) => {
            (StatusCode::OK, axum::Json(serde_json::to_value(report).unwrap()))
        }
        (path, _) => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": format!("no endpoints available for {path}"), "reason": "ServiceUnavailable", "code": 503});
            (StatusCode::SERVICE_UNAVAILABLE, axum::Json(status))
        }
    }
}

/// The URL of a server, as little of one as is needed: a request a connection.
async fn serve(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper_util::service::TowerToHyperService::new(router.clone());
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
        }
    });
    format!("http://{address}")
}

/// The kubeconfig of an API server that says this.
async fn api_server(folder: &Path, api: Api) -> std::path::PathBuf {
    let url = serve(Router::new().fallback(answer).with_state(api)).await;
    let kubeconfig = folder.join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: '{url}'}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: u, namespace: models}}}}]\n\
         users: [{{name: u, user: {{}}}}]\n"
    );
    std::fs::write(&kubeconfig, text).unwrap();
    kubeconfig
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_cluster_with_and_without_its_gateway() {
    let fleet = Fleet::start(&[Role::Prefill, Role::Decode]).await;
    let folder = tempfile::tempdir().unwrap();
    let report = Some(fleet.report().await);
    let kubeconfig = api_server(folder.path(), Api { report }).await;
    // As a plugin of kubectl it is the same.
    let plugin = folder.path().join("kubectl-herd");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_herd"), &plugin).unwrap();
    for program in [Path::new(env!("CARGO_BIN_EXE_herd")), &plugin] {
        let mut status = Command::new(program);
        status.arg("status").env("KUBECONFIG", &kubeconfig).kill_on_drop(true);
        let (well, out, errors) = run(&mut status).await;
        assert!(well, "{errors}");
        assert!(out.starts_with("models/tiny   decode 1/1, prefill 1/1\n"), "{out}");
        assert!(out.contains("  scaled 2026-11-25T10:00:00Z: prefill 1, decode 1: quiet\n"), "{out}");
        assert_eq!(out.matches("  0 %  ").count(), 2, "each gang has its load: {out}");
    }
    let mut help = Command::new(&plugin);
    let (_, out, _) = run(help.args(["status", "--help"])).await;
    assert!(out.contains("Usage: kubectl herd status"), "{out}");
    for (arguments, namespaces) in
        [(&["-n", "elsewhere"][..], &["elsewhere"][..]), (&["-A"], &["elsewhere", "models"])]
    {
        let mut status = herd(&[&["status", "-o", "json"], arguments].concat());
        let (well, out, errors) = run(status.env("KUBECONFIG", &kubeconfig)).await;
        assert!(well, "{errors}");
        let json: Value = serde_json::from_str(&out).unwrap();
        let shown =
            json["deployments"].as_array().unwrap().iter().map(|one| one["namespace"].as_str().unwrap());
        assert_eq!(shown.collect::<Vec<_>>(), namespaces);
    }

    let kubeconfig = api_server(folder.path(), Api { report: None }).await;
    let mut status = herd(&["status", "-o", "json"]);
    let (well, out, errors) = run(status.env("KUBECONFIG", &kubeconfig)).await;
    assert!(well, "{errors}");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert!(json["problem"].as_str().unwrap().contains("the gateway does not answer"), "{json}");
    assert_eq!(json["deployments"][0]["pools"][0]["gangs"][0]["phase"], "Ready");
    let mut missing = herd(&["status", "other"]);
    let (well, _, errors) = run(missing.env("KUBECONFIG", &kubeconfig)).await;
    assert!(!well && errors.contains("there is no LlamaDeployment other"), "{errors}");
}
