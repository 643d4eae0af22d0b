//! The last words of a worker that cannot serve, for the operator to quote.

use std::io;
use std::path::Path;

use crate::WorkerError;
use crate::fetch::FetchError;

/// Kubernetes keeps this much of a termination message, bytes; JSON that is cut there would be no JSON.
const MAX_BYTES: usize = 4096;

/// `{"reason": "CamelCaseReason", "message": "..."}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TerminationMessage {
    /// A constant word.
    pub reason: &'static str,
    /// A sentence a user can act on.
    pub message: String,
}

impl From<&WorkerError> for TerminationMessage {
    fn from(error: &WorkerError) -> Self {
        Self { reason: error.reason(), message: error.to_string() }
    }
}

impl From<&FetchError> for TerminationMessage {
    fn from(error: &FetchError) -> Self {
        Self { reason: error.reason(), message: error.to_string() }
    }
}

impl TerminationMessage {
    /// As JSON, cut to what is kept.
    pub fn to_json(&self) -> String {
        let mut kept = self.clone();
        loop {
            let json = serde_json::json!({"reason": kept.reason, "message": kept.message}).to_string();
            if json.len() <= MAX_BYTES {
                return json;
            }
            let keep = kept.message.len() * 3 / 4;
            kept.message.truncate(kept.message.floor_char_boundary(keep));
        }
    }

    /// Writes it to a file that is there already: outside Kubernetes there is none.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        if file.exists() { std::fs::write(file, self.to_json()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_json_with_both_fields() {
        let error = WorkerError::EngineStopped("rank 1 said \"no\"".to_owned());
        let json: serde_json::Value =
            serde_json::from_str(&TerminationMessage::from(&error).to_json()).unwrap();
        assert_eq!(json["reason"], "EngineStopped");
        assert_eq!(json["message"], error.to_string());
    }

    #[test]
    fn a_long_message_is_cut_and_stays_json() {
        for text in ["é\u{1}\"".repeat(3000), "x".repeat(5000)] {
            let json = TerminationMessage { reason: "X", message: text.clone() }.to_json();
            assert!(json.len() <= MAX_BYTES);
            let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
            let kept = parsed["message"].as_str().unwrap();
            assert!(text.starts_with(kept) && kept.len() > 500);
        }
    }

    #[test]
    fn is_written_only_to_a_file_that_exists() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("termination-log");
        let message = TerminationMessage { reason: "X", message: "y".to_owned() };
        message.write(&file).unwrap();
        assert!(!file.exists());
        std::fs::write(&file, "").unwrap();
        message.write(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), message.to_json());
    }
}
