//! `cargo xtask metrics-doc`: writes `docs/metrics.md` from the declarations in `crates/metrics`.

use anyhow::{Result, ensure};

use crate::paths::Paths;
use crate::step::run;

/// By the test that compares it, told to write.
pub(crate) fn write(paths: &Paths) -> Result<()> {
    let mut test = paths.cargo(&["test", "--release", "--workspace", "--test", "declarations"]);
    test.env("UPDATE_GOLDEN", "1");
    let (success, output) = run(test);
    ensure!(success, "{}", output.trim_end());
    Ok(())
}
