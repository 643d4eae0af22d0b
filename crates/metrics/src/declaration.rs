//! What is said of a metric.

/// One metric, as it is registered and documented.
#[derive(Debug, PartialEq)]
pub struct Metric {
    /// With the unit at its end where it has one, `_total` at that of a counter.
    pub name: &'static str,
    /// What may be done with its value.
    pub kind: Kind,
    /// Of its value.
    pub unit: &'static str,
    /// In this order.
    pub labels: &'static [Label],
    /// One sentence or two.
    pub help: &'static str,
}

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only rises, and starts from 0 with the process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations, counted by these upper bounds.
    Histogram(&'static [f64]),
}

/// A label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// All that it can be.
    pub values: Values,
}

/// What a label can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// One of these. All are on the page from the start.
    Of(&'static [&'static str]),
    /// The name of a model that the fleet serves: at most [`crate::MAX_MODELS`], the rest is [`crate::OTHER_MODELS`].
    Models,
}

impl Kind {
    /// As the text format has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

impl Metric {
    /// Lines on the page at most: the product of what its labels can be, times those of a histogram.
    pub fn most_lines(&self) -> usize {
        let labels = self.labels.iter().map(|label| match label.values {
            Values::Of(values) => values.len(),
            Values::Models => crate::MAX_MODELS + 1,
        });
        let lines = match self.kind {
            Kind::Counter | Kind::Gauge => 1,
            // One a bound, one for what is above them all, the sum and the count.
            Kind::Histogram(bounds) => bounds.len() + 3,
        };
        labels.product::<usize>() * lines
    }

    pub(crate) const fn counter(name: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, unit, labels: &[], help }
    }

    pub(crate) const fn gauge(name: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, unit, labels: &[], help }
    }

    pub(crate) const fn histogram(
        name: &'static str,
        unit: &'static str,
        bounds: &'static [f64],
        help: &'static str,
    ) -> Self {
        Self { name, kind: Kind::Histogram(bounds), unit, labels: &[], help }
    }

    pub(crate) const fn by(self, labels: &'static [Label]) -> Self {
        Self { labels, ..self }
    }
}

/// A label whose values are listed.
pub(crate) const fn label(name: &'static str, values: &'static [&'static str]) -> Label {
    Label { name, values: Values::Of(values) }
}

/// The label that names a served model.
pub(crate) const MODEL: Label = Label { name: "model", values: Values::Models };
