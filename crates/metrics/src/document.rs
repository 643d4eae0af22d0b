//! `docs/metrics.md`.

use crate::alias::{Alias, AliasOf};
use crate::by_model::{MAX_MODELS, OTHER_MODELS};
use crate::declaration::{Kind, Metric, Values};
use crate::{buckets, gateway, operator, process, worker};

/// The page.
pub fn document() -> String {
    let mut text = format!(
        "# Metrics\n\n\
        Written from `crates/metrics` by `cargo xtask metrics-doc`: what is not here is on no page.\n\n\
        | process | where |\n|---|---|\n\
        | worker | `/metrics` of each pod of a gang, port 9001 (`http`) |\n\
        | gateway | `/metrics`, port 8080 (`http`) |\n\
        | operator | `/metrics`, port 8080 (`http`) |\n\n\
        Labels have the values that are listed, all of them on the page from the start. `model` is a name that the fleet \
        serves, never one that a client made up: {MAX_MODELS} of them have their own values, any more are `{OTHER_MODELS}`.\n",
    );
    text += "\n## Worker\n\n";
    text += "The leader of a gang of several pods speaks for the gang. The other pods have the same page, on which only what \
             passes through them counts: KV frames and bytes, bytes between ranks, rows clipped.\n\n";
    text += &table(worker::METRICS);
    text += &aliases(worker::ALIASES);
    text += "\n## Gateway\n\n";
    text += &table(gateway::METRICS);
    text += "\n## Operator\n\n";
    text += &table(operator::METRICS);
    text += "\n## Every process\n\n";
    text += &table(process::METRICS);
    text += &bounds();
    text
}

fn table(metrics: &[&Metric]) -> String {
    let line = |Metric { name, kind, unit, labels, help }: &&Metric| {
        let labels: Vec<String> = labels
            .iter()
            .map(|label| match label.values {
                Values::Of(values) => format!("`{}`: {}", label.name, values.join(", ")),
                Values::Models => format!("`{}`", label.name),
            })
            .collect();
        format!("| `{name}` | {} | {unit} | {} | {help} |\n", kind.word(), labels.join("; "))
    };
    let head = "| metric | kind | unit | labels | meaning |\n|---|---|---|---|---|\n";
    let lines: String = metrics.iter().map(line).collect();
    format!("{head}{lines}")
}

fn aliases(aliases: &[Alias]) -> String {
    let head = "\n### Under other names\n\n\
        The same numbers as vLLM names them, for dashboards and for endpoint pickers of the Gateway API Inference Extension, \
        which read queued and running requests, KV usage, and block size and count. Each has the label `model_name`, the \
        LlamaDeployment's name (`--model-name`, `HERD_MODEL_NAME`). `--metric-aliases=false` (`HERD_METRIC_ALIASES`) leaves \
        them out.\n\n| alias | of |\n|---|---|\n";
    let line = |Alias { name, of }: &Alias| {
        let of = match of {
            AliasOf::Same(metric) => format!("`{}`", metric.name),
            AliasOf::Info(gauges) => {
                let labels: Vec<_> =
                    gauges.iter().map(|(label, metric)| format!("`{label}`: `{}`", metric.name)).collect();
                format!("1, with the labels {}", labels.join(", "))
            }
        };
        format!("| `{name}` | {of} |\n")
    };
    let lines: String = aliases.iter().map(line).collect();
    format!("{head}{lines}")
}

fn bounds() -> String {
    let head = "\n## Bounds of histograms\n\n\
        Dense where targets usually lie, since a quantile is only known between two bounds: 0.2 s to 10 s for the first token, \
        10 ms to 200 ms for the next ones. They reach far beyond, so that a system that is overloaded still shows how slow it \
        is, and they are the same for every model, so that histograms of gangs and releases add up.\n\n\
        | histograms | upper bounds |\n|---|---|\n";
    let all = [worker::METRICS, gateway::METRICS, operator::METRICS].concat();
    let line = |bounds: &'static [f64]| {
        let names: Vec<_> = all
            .iter()
            .filter(|metric| metric.kind == Kind::Histogram(bounds))
            .map(|metric| format!("`{}`", metric.name))
            .collect();
        let bounds: Vec<_> = bounds.iter().map(f64::to_string).collect();
        format!("| {} | {} |\n", names.join(", "), bounds.join(", "))
    };
    let lines: String =
        [buckets::REQUEST_SECONDS, buckets::TOKEN_SECONDS, buckets::STEP_COUNTS, buckets::RECONCILE_SECONDS]
            .map(line)
            .concat();
    format!("{head}{lines}")
}
