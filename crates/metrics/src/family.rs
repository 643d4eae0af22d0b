//! Metrics whose labels have listed values: a child for each combination, made once.

use crate::declaration::{Metric, Values};

/// The children of a metric. Finding one takes no lock and no memory; what is not declared is not there.
#[derive(Clone, Debug)]
pub struct Family<T> {
    metric: &'static Metric,
    /// By the values of the labels, those of the last one changing fastest.
    children: Vec<T>,
}

impl<T> Family<T> {
    pub(crate) fn new<E>(
        metric: &'static Metric,
        mut child: impl FnMut(&[&str]) -> Result<T, E>,
    ) -> Result<Self, E> {
        let children = combinations(metric).iter().map(|values| child(values)).collect::<Result<_, _>>()?;
        Ok(Self { metric, children })
    }

    /// The child with these values; none where one of them is not declared.
    pub fn of(&self, values: &[&str]) -> Option<&T> {
        if values.len() != self.metric.labels.len() {
            return None;
        }
        let mut index = 0;
        for (label, value) in self.metric.labels.iter().zip(values) {
            let Values::Of(declared) = label.values else { return None };
            index = index * declared.len() + declared.iter().position(|declared| declared == value)?;
        }
        self.children.get(index)
    }

    /// Every child with its values.
    pub fn each(&self) -> impl Iterator<Item = (Vec<&'static str>, &T)> {
        combinations(self.metric).into_iter().zip(&self.children)
    }
}

/// The values of the first label change slowest.
fn combinations(metric: &Metric) -> Vec<Vec<&'static str>> {
    metric.labels.iter().fold(vec![vec![]], |before, label| {
        let values = match label.values {
            Values::Of(values) => values,
            Values::Models => &[],
        };
        let with =
            |before: Vec<&'static str>| values.iter().map(move |value| [&before[..], &[*value]].concat());
        before.into_iter().flat_map(with).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declaration::label;

    const METRIC: Metric =
        Metric::counter("a_total", "", "").by(&[label("one", &["x", "y"]), label("two", &["1", "2", "3"])]);

    #[test]
    fn every_combination_has_a_child_of_its_own() {
        let family = Family::new(&METRIC, |values| Ok::<_, ()>(values.concat())).unwrap();
        for one in ["x", "y"] {
            for two in ["1", "2", "3"] {
                assert_eq!(family.of(&[one, two]).unwrap(), &format!("{one}{two}"));
            }
        }
        assert!(family.each().all(|(values, child)| values.concat() == *child));
        assert_eq!(family.each().count(), 6);
    }

    #[test]
    fn what_is_not_declared_is_not_there() {
        let family = Family::new(&METRIC, |values| Ok::<_, ()>(values.concat())).unwrap();
        for values in [&["x", "4"][..], &["z", "1"], &["x"], &["x", "1", "1"]] {
            assert_eq!(family.of(values), None, "{values:?}");
        }
    }
}
