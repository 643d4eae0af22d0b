//! The queries, asked of a real Prometheus. `HERD_PROMETHEUS_PROGRAM` says where the program is.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use herd_control::autoscale::{Reading, Sample};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use super::prometheus::Prometheus;
use super::queries::Queries;

/// Longer than it takes to start, and to have rates.
const PATIENCE: Duration = Duration::from_mins(2);

/// A worker's page: a gang that is busy 9 of 10 seconds. Counters count from 0 again each time `epoch` is raised.
async fn worker(epoch: Arc<AtomicU64>) -> (String, JoinSet<()>) {
    let began = std::sync::Mutex::new((0, Instant::now()));
    let page = move || {
        let epoch = epoch.load(Ordering::SeqCst);
        let mut began = began.lock().unwrap();
        if began.0 != epoch {
            *began = (epoch, Instant::now());
        }
        let seconds = began.1.elapsed().as_secs_f64();
        let (prompt, steps, busy) = (seconds * 1000.0, seconds * 2.0, seconds * 0.9);
        let text = format!(
            "herd_prompt_tokens_total {prompt:.0}\nherd_step_seconds_count {steps:.0}\nherd_step_seconds_sum {busy}\n\
             herd_waiting_prompt_tokens 5\nherd_requests_running 3\nherd_requests_waiting 1\nherd_kv_blocks 100\n\
             herd_kv_blocks_used 7\nherd_sequences_limit 256\nherd_requests_running_not 99\n"
        );
        std::future::ready(([("content-type", "text/plain; version=0.0.4")], text))
    };
    let page = Arc::new(page);
    let router = Router::new().route("/metrics", get(move || page()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut server = JoinSet::new();
    server.spawn(async { axum::serve(listener, router).await.unwrap() });
    (address, server)
}

/// Scrapes a worker's page twice, as two jobs would.
async fn start(program: &str, folder: &std::path::Path, worker: &str) -> (Child, Prometheus) {
    let job = |name| {
        format!(
            "- job_name: {name}\n  static_configs:\n  - targets: [\"{worker}\"]\n    \
             labels: {{namespace: n, pod: m-g-0}}\n"
        )
    };
    let config = format!("global: {{scrape_interval: 1s}}\nscrape_configs:\n{}{}", job("a"), job("b"));
    let file = folder.join("prometheus.yml");
    std::fs::write(&file, config).unwrap();
    // Free a moment ago: the program takes no socket that is open already.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let child = Command::new(program)
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    (child, Prometheus::new(&format!("http://127.0.0.1:{port}")).unwrap())
}

/// Asks until the answer is as it has to be.
async fn until<T>(prometheus: &Prometheus, what: &str, mut look: impl FnMut(Reading) -> Option<T>) -> T {
    let queries = Queries::new(Some("n"), 10_000);
    let asked = async {
        let mut ticks = interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            if let Ok(gathered) = queries.ask(prometheus).await
                && let Some(seen) = look(gathered.reading("n", "m-g-0"))
            {
                return seen;
            }
        }
    };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("never seen: {what}"))
}

#[tokio::test]
async fn a_real_prometheus_gives_samples_and_no_rate_over_a_restart() {
    let Ok(program) = std::env::var("HERD_PROMETHEUS_PROGRAM") else {
        println!(
            "skipped: HERD_PROMETHEUS_PROGRAM is not set; cargo xtask cluster build prometheus builds what it names"
        );
        return;
    };
    let epoch = Arc::new(AtomicU64::new(0));
    let (address, _worker) = worker(Arc::clone(&epoch)).await;
    let folder = tempfile::tempdir().unwrap();
    let (_child, prometheus) = start(&program, folder.path(), &address).await;
    // Busy as it is once the window is full.
    let sample = until(&prometheus, "a sample of a busy gang", |reading| match reading {
        Reading::Sample(sample) if sample.busy_ms_per_s > 800 => Some(sample),
        _ => None,
    })
    .await;
    let Sample { scraped_ms, age_ms, prompt_tokens_per_1000s, steps_per_1000s, busy_ms_per_s, .. } = sample;
    assert!(scraped_ms > 1_700_000_000_000, "{sample:?}");
    // As much in a busy second whatever the window was.
    let of_a_busy_second = prompt_tokens_per_1000s / busy_ms_per_s;
    assert!((1_000..1_250).contains(&of_a_busy_second) && steps_per_1000s > 0, "{sample:?}");
    let gauges =
        Sample { scraped_ms, age_ms, prompt_tokens_per_1000s, steps_per_1000s, busy_ms_per_s, ..GAUGES };
    assert_eq!(sample, gauges);
    epoch.fetch_add(1, Ordering::SeqCst);
    let metric = until(&prometheus, "a restart", |reading| match reading {
        Reading::Missing { metric } => Some(metric),
        _ => None,
    })
    .await;
    assert_eq!(metric, "herd_prompt_tokens_total");
    until(&prometheus, "the process after it", |reading| matches!(reading, Reading::Sample(_)).then_some(()))
        .await;
}

const GAUGES: Sample = Sample {
    scraped_ms: 0,
    age_ms: 0,
    prompt_tokens_per_1000s: 0,
    steps_per_1000s: 0,
    busy_ms_per_s: 0,
    waiting_prompt_tokens: 5,
    running: 3,
    waiting: 1,
    sequences_limit: 256,
    kv_blocks: 100,
    kv_blocks_used: 7,
};
