//! The values of the chart: what they are by default, what they mean, and the table of them say the same keys.

#![expect(clippy::unwrap_used, clippy::panic, reason = "this is how a test fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn schema() -> Value {
    serde_json::from_str(&read("charts/herd/values.schema.json")).unwrap()
}

/// The values that are set one by one: `operator.replicas`, but `operator.resources` as a whole.
fn keys(schema: &Value, prefix: &str, found: &mut BTreeSet<String>, undescribed: &mut Vec<String>) {
    for (name, value) in schema["properties"].as_object().unwrap() {
        let key = format!("{prefix}{name}");
        if value["description"].as_str().is_none_or(|text| text.len() < 10 || !text.ends_with(['.', ']'])) {
            undescribed.push(key.clone());
        }
        if value["properties"].is_object() {
            keys(value, &format!("{key}."), found, undescribed);
        } else {
            found.insert(key);
        }
    }
}

fn of_the_schema() -> BTreeSet<String> {
    let (mut found, mut undescribed) = (BTreeSet::new(), Vec::new());
    keys(&schema(), "", &mut found, &mut undescribed);
    assert_eq!(undescribed, [""; 0], "values without a description");
    assert!(found.len() > 10, "{found:?}");
    // Helm's own.
    found.remove("global");
    found
}

#[test]
fn every_value_has_a_default() {
    let defaults: Value = serde_saphyr::from_str(&read("charts/herd/values.yaml")).unwrap();
    let schema = of_the_schema();
    let mut found = BTreeSet::new();
    leaves(&defaults, "", &schema, &mut found);
    assert_eq!(found, schema);
}

/// Keys of the defaults, down to what the schema calls one value.
fn leaves(value: &Value, key: &str, schema: &BTreeSet<String>, found: &mut BTreeSet<String>) {
    match value.as_object() {
        Some(object) if !schema.contains(key) => {
            for (name, value) in object {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                leaves(value, &key, schema, found);
            }
        }
        _ => {
            found.insert(key.to_owned());
        }
    }
}

#[test]
fn the_table_has_every_value() {
    let text = read("docs/install.md");
    let (_, values) = text.split_once("## Values\n").unwrap();
    let (table, _) = values.split_once("\n## ").unwrap();
    let cells =
        table.lines().filter(|line| line.starts_with("| `")).map(|line| line.split('|').nth(1).unwrap());
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let listed: Vec<String> = names.map(str::to_owned).collect();
    let set: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(set.len(), listed.len(), "a value is there twice: {listed:?}");
    assert_eq!(set, of_the_schema());
}
