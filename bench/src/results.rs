//! The file of figures: a part of it for each part of the bench. Parts that are not run stay as they are, to the last digit.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Names of the parts, and what is written of each.
#[derive(Debug, Default)]
pub(crate) struct Results(Vec<(String, String)>);

impl Results {
    /// What an earlier run has written.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => parse(&text).with_context(|| format!("{}: no figures of this bench", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// In the place of what there was of the part.
    pub(crate) fn set(&mut self, part: &str, figures: &Value) -> Result<()> {
        let text = serde_json::to_string_pretty(figures)?.replace('\n', "\n  ");
        match self.0.iter_mut().find(|(name, _)| name == part) {
            Some((_, earlier)) => *earlier = text,
            None => self.0.push((part.to_owned(), text)),
        }
        Ok(())
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        fs::write(path, self.text()).with_context(|| path.display().to_string())
    }

    fn text(&self) -> String {
        let parts: Vec<String> = self.0.iter().map(|(name, text)| format!("  {name:?}: {text}")).collect();
        format!("{{\n{}\n}}\n", parts.join(",\n"))
    }
}

/// A part begins with its name, two spaces from the margin.
fn parse(text: &str) -> Option<Results> {
    let parts = text.strip_prefix("{\n")?.strip_suffix("\n}\n")?;
    let mut results = Vec::new();
    for part in parts.replace("\n  \"", "\0  \"").split('\0') {
        let (name, text) = part.strip_prefix("  \"")?.split_once("\": ")?;
        results.push((name.to_owned(), text.trim_end_matches(',').to_owned()));
    }
    Some(Results(results))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TEXT: &str = "{
  \"cores\": 2,
  \"kv\": [
    {
      \"ratio\": 3.6267732795011844
    }
  ]
}
";

    #[test]
    fn parts_that_are_not_run_stay_to_the_last_digit() {
        let mut results = parse(TEXT).unwrap();
        assert_eq!(results.text(), TEXT);
        results.set("cores", &json!(4)).unwrap();
        results.set("gang", &json!([{"a": 1}])).unwrap();
        let expected = TEXT
            .replace(": 2", ": 4")
            .replace("\n  ]\n}", "\n  ],\n  \"gang\": [\n    {\n      \"a\": 1\n    }\n  ]\n}");
        assert_eq!(results.text(), expected);
        assert_eq!(parse(&expected).unwrap().text(), expected);
        serde_json::from_str::<Value>(&expected).unwrap();
    }

    #[test]
    fn another_file_is_no_figures() {
        for text in ["", "[]", "{}", "{\"cores\": 2}"] {
            assert!(parse(text).is_none(), "{text}");
        }
    }
}
