//! The page for people, and the data behind it.

use std::path::{Path, PathBuf};

use herd_gateway::{FleetReport, Limits};
use herd_worker::{Role, WorkerLimits};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::chromium::{Chromium, Scheme};
use crate::support::fleet::Fleet;
use crate::support::{Running, endpoint, fleet, gateway_with, soon};

async fn report<F>(running: &Running<F>) -> FleetReport {
    let answer = running.get("/fleet.json").await;
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "application/json"));
    serde_json::from_value(answer.json()).unwrap()
}

async fn ask(fleet: &Fleet, max_tokens: u32) {
    let asked = json!({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": max_tokens});
    assert_eq!(fleet.running.post("/v1/completions", &asked).await.status, 200);
}

#[tokio::test]
async fn the_report_says_what_there_is_and_what_it_does() {
    let fleet = fleet::fake(&[Role::Prefill, Role::Decode, Role::Decode]).await;
    ask(&fleet, 6).await;
    // The report is of this second; the counters are there once the answer is.
    let found = soon(async {
        loop {
            let found = report(&fleet.running).await;
            if found.models[0].time_to_first_token.is_some() {
                return found;
            }
        }
    })
    .await;
    let FleetReport { version, in_flight, window_seconds, models, gangs, left_out } = found;
    assert_eq!((version.as_str(), in_flight, left_out), (env!("CARGO_PKG_VERSION"), 0, 0));
    assert!((0.0..120.0).contains(&window_seconds));
    assert_eq!(models.len(), 1);
    let tiny = &models[0];
    assert_eq!((tiny.name.as_str(), tiny.waiting_for_gang), ("tiny", 0));
    assert_eq!(tiny.last_scale, None);
    let first = tiny.time_to_first_token.unwrap();
    assert!(first.p50 > 0.0 && first.p50 <= first.p99, "{first:?}");
    let mut roles: Vec<_> = gangs.iter().map(|gang| gang.role.as_str()).collect();
    roles.sort_unstable();
    assert_eq!(roles, ["decode", "decode", "prefill"]);
    for gang in &gangs {
        assert_eq!((gang.phase.as_str(), gang.ranks, gang.kv_blocks), ("ready", 1, 64), "{gang:?}");
        assert_eq!(gang.models, ["tiny"]);
        assert!(!gang.id.is_empty() && gang.epoch.parse::<u64>().unwrap() > 0);
    }
}

#[tokio::test]
async fn what_runs_shows() {
    let fleet = fleet::fake(&[Role::Unified]).await;
    fleet.controls[0].close();
    let request = json!({"model": "tiny", "prompt": vec![1; 640], "max_tokens": 128});
    let busy = async {
        soon(async { while report(&fleet.running).await.gangs[0].running == 0 {} }).await;
        let found = report(&fleet.running).await;
        assert_eq!((found.in_flight, found.gangs[0].kv_blocks_used), (1, 10));
        fleet.controls[0].open();
    };
    let ((), answer) = tokio::join!(busy, fleet.running.post("/v1/completions", &request));
    assert_eq!(answer.status, 200);
    soon(async { while report(&fleet.running).await.gangs[0].running > 0 {} }).await;
}

#[tokio::test]
async fn a_fleet_without_gangs_is_a_report_too() {
    let running = gateway_with::<&str>(&[], Limits::default()).await;
    let found = report(&running).await;
    assert_eq!((found.models.len(), found.gangs.len()), (0, 0));
    running.fleet.set(vec![endpoint("127.0.0.1:1")]);
    let found = soon(async {
        loop {
            let found = report(&running).await;
            if !found.gangs.is_empty() {
                return found;
            }
        }
    })
    .await;
    let gang = &found.gangs[0];
    assert_eq!((gang.id.as_str(), gang.role.as_str(), gang.phase.as_str()), ("", "unknown", "away"));
    assert_eq!(found.models[0].name, "tiny");
}

#[tokio::test]
async fn the_page_asks_for_nothing_from_elsewhere() {
    let running = gateway_with::<&str>(&[], Limits::default()).await;
    let page = running.get("/").await;
    assert_eq!((page.status, page.headers["content-type"].as_str()), (200, "text/html; charset=utf-8"));
    let policy = &page.headers["content-security-policy"];
    for part in ["default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    for (path, kind) in
        [("/page.css", "text/css; charset=utf-8"), ("/page.js", "text/javascript; charset=utf-8")]
    {
        let file = running.get(path).await;
        assert_eq!((file.status, file.headers["content-type"].as_str()), (200, kind));
        assert_eq!(file.headers["x-content-type-options"], "nosniff");
        let text = file.text().replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("//") || !text.contains("http"), "{path} names another place");
        // Behind a path of a proxy too.
        assert!(page.text().contains(&format!("\"{}\"", &path[1..])), "{path} is relative");
    }
    assert!(!page.text().contains("http"), "{}", page.text());
    assert_eq!(running.post("/", &json!({})).await.status, 405, "it only shows");
    assert_eq!(running.post("/fleet.json", &json!({})).await.status, 405);
}

fn count(dom: &str, part: &str) -> usize {
    dom.matches(part).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_the_fleet() {
    let Some(chromium) = Chromium::find() else { return };
    let fleet = fleet::fake(&[Role::Prefill, Role::Decode, Role::Decode]).await;
    ask(&fleet, 6).await;
    let url = format!("http://{}/", fleet.running.gateway.addresses().http);
    let dom = chromium.dom(&url, 1280).await;
    assert!(dom.contains("1 model, 3 of 3 gangs ready"), "{dom}");
    assert!(
        dom.contains("prefill: 1 of 1 gang ready") && dom.contains("decode: 2 of 2 gangs ready"),
        "{dom}"
    );
    assert_eq!(count(&dom, "<th scope=\"row\">"), 3, "a row a gang");
    // For a screen reader: each table has a name and heads of columns.
    assert_eq!(count(&dom, "<table aria-label="), 2);
    assert_eq!(count(&dom, "<th scope=\"col\""), 2 * 7);
    for gang in report(&fleet.running).await.gangs {
        assert!(dom.contains(&gang.id), "{} is missing", gang.id);
    }
    assert!(!dom.contains("does not answer"), "{dom}");
    assert!(dom.contains(" ms / "), "times to the first token: {dom}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_no_gang_and_fifty() {
    let Some(chromium) = Chromium::find() else { return };
    let running = gateway_with::<&str>(&[], Limits::default()).await;
    let url = |running: &Running| format!("http://{}/", running.gateway.addresses().http);
    let dom = chromium.dom(&url(&running), 400).await;
    assert!(dom.contains("No model yet") && dom.contains("0 models"), "{dom}");

    let fleet = fleet::fake(&[Role::Unified; 50]).await;
    let dom = chromium.dom(&url(&fleet.running), 400).await;
    assert!(dom.contains("unified: 50 of 50 gangs ready"), "{dom}");
    assert_eq!(count(&dom, "<th scope=\"row\">"), 50);
}

/// The page's files, and this in the place of what a gateway says.
async fn page_of(report: serde_json::Value) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 4096];
            let length = stream.read(&mut asked).await.unwrap_or_default();
            let asked = String::from_utf8_lossy(&asked[..length]).into_owned();
            let (kind, body) = match asked.split(' ').nth(1) {
                Some("/") => ("text/html", include_str!("../../src/page/page.html").to_owned()),
                Some("/page.js") => ("text/javascript", include_str!("../../src/page/page.js").to_owned()),
                Some("/page.css") => ("text/css", include_str!("../../src/page/page.css").to_owned()),
                _ => ("application/json", report.to_string()),
            };
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            // A browser also opens connections that it does not use.
            let _ = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    format!("http://{address}/")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_each_number_where_it_belongs() {
    let Some(chromium) = Chromium::find() else { return };
    let gang = |id: &str, model: &str, role: &str, phase: &str, used: u32| {
        json!({
            "id": id, "models": [model], "role": role, "phase": phase, "revision": "r1", "epoch": "1", "ranks": 8,
            "kv_blocks": 200, "kv_blocks_used": used, "running": 5, "waiting": 1, "waiting_prompt_tokens": 0,
            "max_sequences": 64,
        })
    };
    let model = |name: &str| {
        json!({
            "name": name, "digest": "sha256:0123456789abcdef", "context_length": 8192, "waiting_for_gang": 2,
            "requests_per_second": 1.25, "output_tokens_per_second": 80.4,
            "time_to_first_token": {"p50": 0.12, "p99": 0.3449}, "inter_token_latency": null,
            "last_scale": {"time": "2026-11-25T10:00:00Z", "prefill": null, "decode": 2, "reason": "KV use is 91 %"},
        })
    };
    let url = page_of(json!({
        "version": "0.1.0", "in_flight": 3, "window_seconds": 60.0, "left_out": 4,
        "models": [model("one"), model("two")],
        "gangs": [
            gang("aaa", "one", "decode", "ready", 182), gang("bbb", "one", "decode", "away", 0),
            gang("ccc", "two", "unified", "ready", 50),
        ],
    }))
    .await;
    let dom = chromium.dom(&url, 1280).await;
    assert!(
        dom.contains(
            "2 models, 2 of 3 gangs ready, 4 gangs not shown, 3 requests in work; rates of the last 60 s"
        ),
        "{dom}"
    );
    assert!(dom.contains("<h3>decode: 1 of 2 gangs ready</h3>"), "{dom}");
    assert!(dom.contains("<h3>unified: 1 of 1 gang ready</h3>"), "{dom}");
    assert_eq!(count(&dom, "<th scope=\"row\">"), 3, "each gang under its own model: {dom}");
    assert_eq!(count(&dom, "<dd>120 ms / 345 ms</dd>"), 2, "{dom}");
    for (title, part) in
        [("182 of 200 blocks", "91%"), ("50 of 200 blocks", "25%"), ("0 of 200 blocks", "0%")]
    {
        let at = dom.find(&format!("title=\"{title}\"")).unwrap_or_else(|| panic!("{title}: {dom}"));
        let meter = &dom[at..at + dom[at..].find("</div>").unwrap()];
        assert!(meter.contains(&format!("width=\"{part}\"")), "{meter}");
        assert!(meter.contains(&format!("<span>{part}</span>")), "{meter}");
        assert_eq!(meter.contains("high"), part == "91%", "{meter}");
    }
    assert_eq!(count(&dom, "Last scaled 2026-11-25T10:00:00Z: decode 2. KV use is 91 %"), 2, "{dom}");
}

/// Writes pictures to the folder that `HERD_SCREENSHOTS` names; the one in the README is `fleet-light.png`.
#[tokio::test(flavor = "multi_thread")]
async fn pictures_of_the_page() {
    let Some(folder) = std::env::var_os("HERD_SCREENSHOTS").map(PathBuf::from) else {
        println!("skipped: HERD_SCREENSHOTS names no folder");
        return;
    };
    let Some(chromium) = Chromium::find() else { return };
    let roles = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode, Role::Decode];
    let limits = WorkerLimits { max_step_tokens: 64, ..WorkerLimits::default() };
    let fleet = fleet::fake_with(&roles, limits).await;
    for _ in 0..20 {
        ask(&fleet, 24).await;
    }
    for picture in PICTURES {
        // Decode gangs are held in their steps, so that the picture shows something at work.
        fleet.controls[2..].iter().for_each(herd_engine::FakeControl::close);
        let shoot = async {
            // A step lets those in that came during the one before.
            let some_steps = async {
                for _ in 0..12 {
                    for control in &fleet.controls[2..] {
                        control.pass().await;
                    }
                }
            };
            soon(some_steps).await;
            take(&chromium, &fleet.running, &folder, "fleet", picture).await;
            fleet.controls.iter().for_each(herd_engine::FakeControl::open);
        };
        let requests = (0..12).map(|number| {
            let asked =
                json!({"model": "tiny", "prompt": vec![1; 200 + 70 * number], "max_tokens": 500 + 60 * number});
            let running = &fleet.running;
            async move { running.post("/v1/completions", &asked).await }
        });
        tokio::join!(shoot, futures::future::join_all(requests));
    }

    let many = fleet::fake(&[Role::Unified; 50]).await;
    let none = gateway_with::<&str>(&[], Limits::default()).await;
    for picture in PICTURES {
        take(&chromium, &many.running, &folder, "fifty", picture).await;
        take(&chromium, &none, &folder, "empty", picture).await;
    }
}

/// A scheme, a word for it, and a size of the window.
type Picture = (Scheme, &'static str, (u32, u32));

const PICTURES: [Picture; 4] = [
    (Scheme::Light, "light", (1280, 760)),
    (Scheme::Dark, "dark", (1280, 760)),
    (Scheme::Light, "light-400", (400, 900)),
    (Scheme::Dark, "dark-400", (400, 900)),
];

async fn take(chromium: &Chromium, running: &Running, folder: &Path, name: &str, picture: Picture) {
    let (scheme, word, size) = picture;
    let url = format!("http://{}/", running.gateway.addresses().http);
    chromium.screenshot(&url, size, scheme, &folder.join(format!("{name}-{word}.png"))).await;
}
