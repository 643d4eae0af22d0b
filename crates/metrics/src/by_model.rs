//! Metrics with the label `model`: names of the fleet's models, of which only so many get children of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Models with a value of their own.
pub const MAX_MODELS: usize = 64;

/// The value of all others. Not a name that a model can have.
pub const OTHER_MODELS: &str = "(other)";

type Make<T> = Box<dyn Fn(&str) -> Result<T, prometheus::Error> + Send + Sync>;
type Forget = Box<dyn Fn(&str) + Send + Sync>;

/// The children of a metric by model. A child is looked up once a request and then kept by it.
pub struct ByModel<T> {
    make: Make<T>,
    forget: Forget,
    children: Mutex<BTreeMap<String, T>>,
}

impl<T> std::fmt::Debug for ByModel<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ByModel").finish_non_exhaustive()
    }
}

impl<T: Clone> ByModel<T> {
    pub(crate) fn new(
        make: impl Fn(&str) -> Result<T, prometheus::Error> + Send + Sync + 'static,
        forget: impl Fn(&str) + Send + Sync + 'static,
    ) -> Self {
        Self { make: Box::new(make), forget: Box::new(forget), children: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, T>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The child of a model. `name` has to be one that the fleet serves.
    pub fn of(&self, name: &str) -> Result<T, prometheus::Error> {
        let mut children = self.lock();
        let own = children.contains_key(name)
            || children.keys().filter(|name| *name != OTHER_MODELS).count() < MAX_MODELS;
        let name = if own { name } else { OTHER_MODELS };
        if let Some(child) = children.get(name) {
            return Ok(child.clone());
        }
        let child = (self.make)(name)?;
        children.insert(name.to_owned(), child.clone());
        Ok(child)
    }

    /// Forgets models that the fleet does not serve any more.
    pub fn keep(&self, served: &BTreeSet<String>) {
        let mut children = self.lock();
        children.retain(|name, _| {
            let kept = name == OTHER_MODELS || served.contains(name);
            if !kept {
                (self.forget)(name);
            }
            kept
        });
    }

    /// Every model that has a child, and it.
    pub fn each(&self) -> Vec<(String, T)> {
        self.lock().iter().map(|(name, child)| (name.clone(), child.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{IntCounterVec, Opts};

    use super::*;

    #[test]
    fn models_beyond_the_bound_share_a_child_and_those_that_are_gone_make_room() {
        let family = IntCounterVec::new(Opts::new("a_total", "a"), &["model"]).unwrap();
        let all = family.clone();
        let models = ByModel::new(
            move |name| family.get_metric_with_label_values(&[name]),
            move |name| drop(all.remove_label_values(&[name])),
        );
        for number in 0..3 * MAX_MODELS {
            models.of(&format!("model-{number}")).unwrap().inc();
        }
        assert_eq!(models.each().len(), MAX_MODELS + 1);
        assert_eq!(models.of("model-0").unwrap().get(), 1);
        assert_eq!(models.of("one more").unwrap().get(), 2 * MAX_MODELS as u64);

        models.keep(&BTreeSet::from(["model-3".to_owned()]));
        let kept: Vec<String> = models.each().into_iter().map(|(name, _)| name).collect();
        assert_eq!(kept, [OTHER_MODELS, "model-3"]);
        assert_eq!(models.of("model-0").unwrap().get(), 0, "counts anew");
    }
}
