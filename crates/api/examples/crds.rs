//! Writes every custom resource definition into a folder: `crds FOLDER`.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: crds FOLDER");
        return ExitCode::FAILURE;
    };
    for crd in herd_api::crds() {
        let path = folder.join(format!("{}.yaml", crd.spec.names.plural));
        let written = herd_api::crd_yaml(&crd)
            .map_err(|error| error.to_string())
            .and_then(|yaml| std::fs::write(&path, yaml).map_err(|error| error.to_string()));
        if let Err(error) = written {
            eprintln!("failed to write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
