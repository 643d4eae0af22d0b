//! Reads the output of `cargo test -- --show-output`.

use crate::step::{Outcome, compiled};

/// Sums the result lines of all test binaries. A test that cannot run here prints `skipped: WHY` and returns: it counts as
/// skipped. When cargo failed without a failed test (it did not compile, a test binary died), that is one failure.
pub(crate) fn outcome(success: bool, output: String) -> Outcome {
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    let mut skipped = Vec::new();
    let mut in_successes = false;
    for line in output.lines() {
        if let "successes:" | "failures:" = line {
            in_successes = line == "successes:";
        } else if let Some(why) = line.strip_prefix("skipped: ").filter(|_| in_successes) {
            skipped.push(why.to_owned());
        } else if let Some([p, f, i]) = result_line(line) {
            passed += p;
            failed += f;
            ignored += i;
        }
    }
    if !success && failed == 0 {
        failed = 1;
    }
    passed = passed.saturating_sub(skipped.len());
    Outcome { passed, failed, skipped, ignored, note: compiled(&output), output }
}

/// `test result: ok. 13 passed; 0 failed; 0 ignored; ...`
fn result_line(line: &str) -> Option<[usize; 3]> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |part: &str, what: &str| part.trim().strip_suffix(what)?.trim().parse().ok();
    let mut parts = counts.split(';');
    Some([count(parts.next()?, "passed")?, count(parts.next()?, "failed")?, count(parts.next()?, "ignored")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "   Compiling herd v0.1.0
running 3 tests
test a ... ok
test b ... ok
test c ... ignored
successes:

---- b stdout ----
skipped: no model

successes:
    a
    b

failures:

---- d stdout ----
skipped: a test that fails is none that is skipped

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.18s
test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 17 filtered out; finished in 0.00s
";

    #[test]
    fn sums_all_test_binaries() {
        let Outcome { passed, failed, skipped, ignored, note, output } = outcome(false, OUTPUT.to_owned());
        assert_eq!((passed, failed, ignored), (5, 2, 1));
        assert_eq!(skipped, ["no model"]);
        assert_eq!(note, "built 1 crates");
        assert_eq!(output, OUTPUT);
    }

    #[test]
    fn a_failure_without_a_result_line_counts() {
        assert_eq!(outcome(false, "error: could not compile `herd`\n".to_owned()).failed, 1);
        let killed = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\nsignal: 11, SIGSEGV\n";
        let outcome = outcome(false, killed.to_owned());
        assert_eq!((outcome.passed, outcome.failed), (2, 1));
    }
}
