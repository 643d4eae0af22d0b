//! What becomes of the examples: the pods of a gang of each role, as `docs/rendered` shows them.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use herd_api::LlamaDeployment;
use herd_control::revision::{Defaults, GangTemplate, ModelCache};
use herd_control::{Claims, ValidatedPool, build, validate};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)
}

fn rendered(example: &str) -> Result<String, Box<dyn Error>> {
    let mut object: LlamaDeployment = serde_saphyr::from_str(example)?;
    object.metadata.namespace = Some("default".to_owned());
    object.metadata.uid = Some("00000000-0000-0000-0000-000000000000".to_owned());
    let validated = validate(&object, &Claims::default())?;
    let mut text = String::new();
    for (number, ValidatedPool { role, gang, .. }) in validated.pools.iter().enumerate() {
        let defaults = Defaults {
            worker_image: "REGISTRY/herd-worker:TAG".to_owned(),
            model_cache: ModelCache::default(),
        };
        // What its branch was at when it was asked.
        let pin = gang.source.starts_with("hf://").then_some("0123456789abcdef0123456789abcdef01234567");
        let template = GangTemplate::new(gang, &defaults).with_pin(pin, &defaults);
        let input = build::PodInput {
            deployment: &validated.name,
            namespace: &validated.namespace,
            owner: &validated.owner,
            role: *role,
            gang: &format!("0000000{number}"),
            revision: &herd_control::revision::hash_pinned(gang, pin),
            template: &template,
            pod_groups: false,
        };
        for mut pod in build::pods(input)? {
            // Of the LlamaPool, which has no uid before it is made.
            pod.metadata.owner_references = None;
            text += "---\n";
            text += serde_saphyr::to_string(&pod)?.trim_end();
            text += "\n";
        }
    }
    Ok(text)
}

/// Run with `UPDATE_GOLDEN=1` to write them anew, and read what changed: gangs of revisions that are there are made of it.
#[test]
fn the_examples_become_what_the_documentation_shows() {
    let mut seen = 0;
    for entry in fs::read_dir(folder("examples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let golden = folder("docs/rendered").join(&name);
        let pods = rendered(&fs::read_to_string(&path).unwrap()).unwrap();
        let text = format!("# One gang of each role of examples/{name}, as the operator makes it.\n{pods}");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&golden, &text).unwrap();
        }
        assert_eq!(fs::read_to_string(&golden).unwrap_or_default(), text, "{name}");
        seen += 1;
    }
    assert!(seen >= 4, "{seen} examples");
}
