//! The `/metrics` page of a process: what it has declared, all of it and nothing else.

use prometheus::core::{MetricVec, MetricVecBuilder};
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::alias::{self, Alias};
use crate::by_model::ByModel;
use crate::declaration::{Kind, Metric};
use crate::family::Family;

/// A page that does not say what is declared.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// Registered and not declared.
    #[error("metric {0} is not declared for this page")]
    Undeclared(&'static str),
    /// Declared and not registered.
    #[error("metric {0} is declared for this page and not registered")]
    Missing(&'static str),
    /// Declared as something else.
    #[error("metric {name} is declared as a {declared}")]
    Kind {
        /// Of the metric.
        name: &'static str,
        /// Its kind.
        declared: &'static str,
    },
    /// The registry's own.
    #[error(transparent)]
    Registry(#[from] prometheus::Error),
}

/// Registers the metrics of a page.
#[derive(Debug)]
pub struct PageBuilder {
    registry: Registry,
    declared: &'static [&'static Metric],
    registered: Vec<&'static str>,
    aliases: &'static [Alias],
}

/// Everything that a process counts.
#[derive(Clone, Debug)]
pub struct Page {
    registry: Registry,
    aliases: &'static [Alias],
}

impl PageBuilder {
    /// With these on it, and with those of the process: memory, processor time, file descriptors.
    pub fn new(declared: &'static [&'static Metric]) -> Result<Self, PageError> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self { registry, declared, registered: Vec::new(), aliases: &[] })
    }

    /// The same numbers under the names that others give them.
    #[must_use]
    pub fn with_aliases(self, aliases: &'static [Alias]) -> Self {
        Self { aliases, ..self }
    }

    fn take(&mut self, metric: &'static Metric, kind: &'static str) -> Result<(), PageError> {
        if !self.declared.iter().any(|declared| declared.name == metric.name) {
            return Err(PageError::Undeclared(metric.name));
        }
        let declared = metric.kind.word();
        if declared != kind {
            return Err(PageError::Kind { name: metric.name, declared });
        }
        self.registered.push(metric.name);
        Ok(())
    }

    /// A counter without labels.
    pub fn counter(&mut self, metric: &'static Metric) -> Result<IntCounter, PageError> {
        self.take(metric, "counter")?;
        let counter = IntCounter::with_opts(opts(metric))?;
        self.registry.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    /// A gauge without labels.
    pub fn gauge(&mut self, metric: &'static Metric) -> Result<IntGauge, PageError> {
        self.take(metric, "gauge")?;
        let gauge = IntGauge::with_opts(opts(metric))?;
        self.registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    /// A gauge that is no whole number.
    pub fn fraction(&mut self, metric: &'static Metric) -> Result<Gauge, PageError> {
        self.take(metric, "gauge")?;
        let gauge = Gauge::with_opts(opts(metric))?;
        self.registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    /// A histogram without labels.
    pub fn histogram(&mut self, metric: &'static Metric) -> Result<Histogram, PageError> {
        self.take(metric, "histogram")?;
        let histogram = Histogram::with_opts(histogram_opts(metric))?;
        self.registry.register(Box::new(histogram.clone()))?;
        Ok(histogram)
    }

    /// Counters by the listed values of their labels.
    pub fn counters(&mut self, metric: &'static Metric) -> Result<Family<IntCounter>, PageError> {
        self.take(metric, "counter")?;
        let family = IntCounterVec::new(opts(metric), &names(metric))?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(Family::new(metric, |values| family.get_metric_with_label_values(values))?)
    }

    /// Gauges by the listed values of their labels.
    pub fn gauges(&mut self, metric: &'static Metric) -> Result<Family<IntGauge>, PageError> {
        self.take(metric, "gauge")?;
        let family = IntGaugeVec::new(opts(metric), &names(metric))?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(Family::new(metric, |values| family.get_metric_with_label_values(values))?)
    }

    /// Histograms by the listed values of their labels.
    pub fn histograms(&mut self, metric: &'static Metric) -> Result<Family<Histogram>, PageError> {
        self.take(metric, "histogram")?;
        let family = HistogramVec::new(histogram_opts(metric), &names(metric))?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(Family::new(metric, |values| family.get_metric_with_label_values(values))?)
    }

    /// Counters by model.
    pub fn counters_by_model(&mut self, metric: &'static Metric) -> Result<ByModel<IntCounter>, PageError> {
        self.take(metric, "counter")?;
        let family = IntCounterVec::new(opts(metric), &names(metric))?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(by_model(family))
    }

    /// Gauges by model.
    pub fn gauges_by_model(&mut self, metric: &'static Metric) -> Result<ByModel<IntGauge>, PageError> {
        self.take(metric, "gauge")?;
        let family = IntGaugeVec::new(opts(metric), &names(metric))?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(by_model(family))
    }

    /// Histograms by model.
    pub fn histograms_by_model(&mut self, metric: &'static Metric) -> Result<ByModel<Histogram>, PageError> {
        self.take(metric, "histogram")?;
        let family = HistogramVec::new(histogram_opts(metric), &names(metric))?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(by_model(family))
    }

    /// The page, if all that is declared is on it.
    pub fn finish(self) -> Result<Page, PageError> {
        let Self { registry, declared, registered, aliases } = self;
        match declared.iter().find(|metric| !registered.contains(&metric.name)) {
            Some(metric) => Err(PageError::Missing(metric.name)),
            None => Ok(Page { registry, aliases }),
        }
    }
}

impl Page {
    /// In Prometheus's text format; `model` is what aliases say their numbers are about.
    pub fn text(&self, model: &str) -> Result<String, prometheus::Error> {
        let mut families = self.registry.gather();
        families.extend(alias::families(self.aliases, &families, model));
        TextEncoder::new().encode_to_string(&families)
    }
}

fn by_model<B: MetricVecBuilder<M: Clone>>(family: MetricVec<B>) -> ByModel<B::M>
where
    MetricVec<B>: Send + Sync + 'static,
{
    let all = family.clone();
    let make = move |name: &str| family.get_metric_with_label_values(&[name]);
    // One that is not there any more is what is wanted.
    ByModel::new(make, move |name| drop(all.remove_label_values(&[name])))
}

fn opts(metric: &Metric) -> Opts {
    Opts::new(metric.name, metric.help)
}

fn histogram_opts(metric: &Metric) -> HistogramOpts {
    let bounds = match metric.kind {
        Kind::Histogram(bounds) => bounds.to_vec(),
        Kind::Counter | Kind::Gauge => vec![],
    };
    HistogramOpts::new(metric.name, metric.help).buckets(bounds)
}

fn names(metric: &Metric) -> Vec<&'static str> {
    metric.labels.iter().map(|label| label.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Metric = Metric::counter("one_total", "things", "One.");
    const TWO: Metric = Metric::gauge("two", "things", "Two.");

    #[test]
    fn a_page_has_what_is_declared_and_nothing_else() {
        let mut page = PageBuilder::new(&[&ONE]).unwrap();
        assert!(matches!(page.gauge(&TWO), Err(PageError::Undeclared("two"))));
        assert!(matches!(page.gauge(&ONE), Err(PageError::Kind { .. })));
        assert!(matches!(PageBuilder::new(&[&ONE]).unwrap().finish(), Err(PageError::Missing("one_total"))));
        page.counter(&ONE).unwrap().inc();
        assert!(page.finish().unwrap().text("").unwrap().contains("one_total 1"));
    }
}
