//! The same numbers under the names that vLLM gives them, for dashboards, and for endpoint pickers of the Gateway API
//! Inference Extension, which read them from a model server.

use prometheus::proto::{Gauge, LabelPair, MetricFamily, MetricType};

use crate::declaration::{Kind, Metric};

/// The label that says which model it is.
const MODEL_NAME: &str = "model_name";

/// Another name of a metric.
#[derive(Debug, PartialEq)]
pub struct Alias {
    /// As others call it.
    pub name: &'static str,
    /// What it is.
    pub of: AliasOf,
}

/// What an alias says.
#[derive(Debug, PartialEq)]
pub enum AliasOf {
    /// The same as this one.
    Same(&'static Metric),
    /// 1, with the values of these gauges as labels.
    Info(&'static [(&'static str, &'static Metric)]),
}

impl Alias {
    /// As the text format has it.
    pub fn kind(&self) -> Kind {
        match self.of {
            AliasOf::Same(metric) => metric.kind,
            AliasOf::Info(_) => Kind::Gauge,
        }
    }
}

/// What the aliases say where the page says `families`.
pub(crate) fn families(
    aliases: &'static [Alias],
    families: &[MetricFamily],
    model: &str,
) -> Vec<MetricFamily> {
    let find = |metric: &Metric| families.iter().find(|family| family.name() == metric.name);
    let alias = |alias: &Alias| {
        let mut family = match alias.of {
            AliasOf::Same(metric) => {
                let mut family = find(metric)?.clone();
                family.set_help(format!("Alias of {}.", metric.name));
                family
            }
            AliasOf::Info(gauges) => info(gauges, find)?,
        };
        family.set_name(alias.name.to_owned());
        for metric in family.mut_metric() {
            let mut labels = metric.take_label();
            labels.push(pair(MODEL_NAME, model.to_owned()));
            metric.set_label(labels);
        }
        Some(family)
    };
    aliases.iter().filter_map(alias).collect()
}

fn info<'a>(
    gauges: &[(&str, &Metric)],
    find: impl Fn(&Metric) -> Option<&'a MetricFamily>,
) -> Option<MetricFamily> {
    let labels = gauges.iter().map(|(label, metric)| {
        let value = find(metric)?.get_metric().first()?.get_gauge().get_value();
        Some(pair(label, value.to_string()))
    });
    let mut gauge = Gauge::default();
    gauge.set_value(1.0);
    let mut metric = prometheus::proto::Metric::from_gauge(gauge);
    metric.set_label(labels.collect::<Option<_>>()?);
    let mut family = MetricFamily::default();
    family.set_field_type(MetricType::GAUGE);
    family.set_help("1, about the KV cache.".to_owned());
    family.set_metric(vec![metric]);
    Some(family)
}

fn pair(name: &str, value: String) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value);
    pair
}
