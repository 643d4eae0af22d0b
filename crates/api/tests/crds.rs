//! `crds/` is what the types say, and small. What they refuse is an end-to-end test.

use std::path::Path;

fn committed(plural: &str) -> std::io::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../crds/{plural}.yaml"));
    std::fs::read_to_string(path)
}

#[test]
fn the_files_are_what_the_types_say() {
    for crd in herd_api::crds() {
        let plural = &crd.spec.names.plural;
        assert_eq!(committed(plural).unwrap(), herd_api::crd_yaml(&crd).unwrap(), "run cargo xtask crds");
    }
}

#[test]
fn together_they_are_below_64_kib() {
    let total: usize = herd_api::crds().iter().map(|crd| serde_json::to_string(crd).unwrap().len()).sum();
    assert!(total < 64 << 10, "{total} bytes");
}
