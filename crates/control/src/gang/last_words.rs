//! How a container ended that gave no reason of its own, and what it logged before.

use serde::Deserialize;

/// What a shell adds to the number of the signal that ended a process.
const SIGNALLED: i32 = 128;

/// A line of a worker's log in JSON.
#[derive(Deserialize)]
struct LogLine {
    fields: Fields,
}

#[derive(Deserialize)]
struct Fields {
    message: String,
}

/// A sentence.
pub(super) fn ended(reason: Option<&str>, exit_code: i32, signal: Option<i32>) -> String {
    if reason == Some("OOMKilled") {
        return "the worker was killed: it needed more memory than its limit (OOMKilled)".to_owned();
    }
    let signal = signal.filter(|signal| *signal > 0).or(exit_code.checked_sub(SIGNALLED));
    match signal.filter(|signal| (1..=64).contains(signal)) {
        Some(signal) => match name(signal) {
            Some(name) => format!("the worker was killed by signal {signal} ({name})"),
            None => format!("the worker was killed by signal {signal}"),
        },
        None => format!("the worker ended with exit code {exit_code}"),
    }
}

fn name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        _ => return None,
    })
}

/// The end of a container's log, for a person: what the last line in JSON says, or what came after it, a panic's words.
pub(super) fn logged(end: &str) -> Option<String> {
    let mut message = None;
    let mut text: Vec<&str> = Vec::new();
    for line in end.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match serde_json::from_str::<LogLine>(line) {
            Ok(LogLine { fields: Fields { message: said } }) => {
                message = Some(said);
                text.clear();
            }
            // Nothing that anybody could read: the end of a line, or one without a message.
            Err(_) if line.ends_with('}') && line.contains("\":") => {}
            Err(_) => text.push(line),
        }
    }
    if text.is_empty() { message.filter(|message| !message.is_empty()) } else { Some(text.join("\n")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str) -> String {
        let line = r#"{"timestamp":"2026-01-02T03:04:05Z","level":"INFO","fields":{"message":"M","step":3},"target":"t"}"#;
        line.replace('M', message)
    }

    #[test]
    fn how_it_ended_is_a_sentence() {
        for (reason, code, signal, sentence) in [
            (Some("OOMKilled"), 137, None, "killed: it needed more memory than its limit (OOMKilled)"),
            (Some("Error"), 137, None, "killed by signal 9 (SIGKILL)"),
            (Some("Error"), 137, Some(0), "killed by signal 9 (SIGKILL)"),
            (None, 1, Some(11), "killed by signal 11 (SIGSEGV)"),
            (None, 162, None, "killed by signal 34"),
        ] {
            assert_eq!(ended(reason, code, signal), format!("the worker was {sentence}"));
        }
        for code in [1, 128, 255, i32::MIN] {
            assert_eq!(ended(Some("Error"), code, None), format!("the worker ended with exit code {code}"));
        }
    }

    #[test]
    fn of_json_only_the_last_message_is_quoted() {
        assert_eq!(logged(&format!("{}\n{}\n", line("a"), line("b"))).as_deref(), Some("b"));
        // The kubelet keeps the last bytes, whatever they begin with.
        assert_eq!(logged(&format!("{}\n{}", &line("a")[20..], line("b"))).as_deref(), Some("b"));
        assert_eq!(logged(&line("a")[20..]), None);
        assert_eq!(logged(&line("")), None);
        assert_eq!(logged(" \n"), None);
    }

    #[test]
    fn what_is_no_json_is_quoted_as_it_is() {
        let panic = "thread 'main' panicked at a.rs:1:2:\nno {\"a\": \"room\"} left";
        assert_eq!(logged(&format!("{}\n{panic}\n", line("a"))).as_deref(), Some(panic));
        assert_eq!(logged("INFO loads\nERROR fails").as_deref(), Some("INFO loads\nERROR fails"));
    }
}
