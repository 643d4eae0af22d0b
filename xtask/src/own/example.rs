//! The example, with the model that was pushed.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};

use super::MADE_BY;
use crate::images::Image;
use crate::kubectl::Kubectl;
use crate::paths::Paths;
use crate::up;

/// Applies it in the context's namespace; what that did.
pub(crate) fn apply(paths: &Paths, kubectl: &Kubectl, namespace: &str, model: &Image) -> Result<String> {
    let get = ["get", "llamadeployments.herd.dev", up::MODEL, "--ignore-not-found", "-o", "name"];
    let (key, value) = MADE_BY;
    let label =
        ["-o", &format!("jsonpath={{.metadata.labels.{}}}", key.replace('.', "\\."))].map(str::to_owned);
    if !kubectl.text(&get)?.is_empty() {
        let found = kubectl.text(&[&get[..4], &label.each_ref().map(String::as_str)].concat())?;
        if found != value {
            bail!(
                "there is a LlamaDeployment {} in namespace {namespace} already, which this has not made",
                up::MODEL
            );
        }
    }
    let path = paths.root.join(up::EXAMPLE);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let applied = kubectl.text_of(&["apply", "-f", "-"], &with_model(&text, model)?)?;
    Ok(applied.split_whitespace().last().unwrap_or("applied").to_owned())
}

/// The example's text with another source of the model, and with the label.
fn with_model(example: &str, model: &Image) -> Result<String> {
    let (key, value) = MADE_BY;
    let (mut sources, mut names) = (0, 0);
    let mut text = String::new();
    for line in example.lines() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if line.trim_start().starts_with("source: oci://") {
            sources += 1;
            text.extend([indent, "source: oci://", &model.reference, "\n"]);
        } else {
            text.extend([line, "\n"]);
        }
        if line == format!("  name: {}", up::MODEL) {
            names += 1;
            text.extend([indent, "labels: {", key, ": ", value, "}\n"]);
        }
    }
    ensure!((sources, names) == (1, 1), "{}: want one name {} and one source oci://", up::EXAMPLE, up::MODEL);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn the_example_serves_the_model_that_was_pushed() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(up::EXAMPLE);
        let example = fs::read_to_string(path).unwrap();
        let model = Image {
            name: "m".to_owned(),
            reference: "r.example:5000/team/m:0123".to_owned(),
            layout: PathBuf::new(),
        };
        let text = with_model(&example, &model).unwrap();
        assert!(text.contains("\n    source: oci://r.example:5000/team/m:0123\n"), "{text}");
        assert!(text.contains("\n  name: smollm2\n  labels: {herd.dev/made-by: xtask}\n"), "{text}");
        assert!(!text.contains("lk.local"), "{text}");
        assert_eq!(text.lines().count(), example.lines().count() + 1);
        assert!(with_model("kind: LlamaDeployment\n", &model).is_err());
    }
}
