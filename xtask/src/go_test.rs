//! Reads the output of `go test -v`.

use crate::step::Outcome;

/// Counts the tests, not their parts. Tests that cannot run here print `SKIP: WHY` at the start of a line. When go failed without a failed test (it did not compile, it timed out), that is one
/// failure.
pub(crate) fn outcome((success, output): (bool, String)) -> Outcome {
    let count = |verdict: &str| output.lines().filter(|line| line.starts_with(verdict)).count();
    let (passed, mut failed) = (count("--- PASS: "), count("--- FAIL: "));
    let skipped = output.lines().filter_map(|line| line.strip_prefix("SKIP: ")).map(str::to_owned).collect();
    if !success && failed == 0 {
        failed = 1;
    }
    Outcome { passed, failed, skipped, output, ..Outcome::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_tests_and_says_why_some_did_not_run() {
        let output = "=== RUN   TestA
--- PASS: TestA (0.1s)
    --- PASS: TestA/part (0.1s)
=== RUN   TestC
--- FAIL: TestC (0.0s)
FAIL
SKIP: the others did not run: they need root
";
        let Outcome { passed, failed, skipped, .. } = outcome((false, output.to_owned()));
        assert_eq!((passed, failed), (1, 1));
        assert_eq!(skipped, ["the others did not run: they need root"]);
    }

    #[test]
    fn what_does_not_compile_is_a_failure() {
        assert_eq!(outcome((false, "# herd.dev/cluster\n".to_owned())).failed, 1);
        assert_eq!(outcome((true, "ok\n".to_owned())).failed, 0);
    }
}
