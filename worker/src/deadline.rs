//! The deadline a caller sends along: metadata `grpc-timeout`, which tonic applies up to the first message of a stream and
//! not to what follows.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// When the caller stops waiting. None: it never does, or says so in a way that gRPC does not know.
pub(crate) fn of(metadata: &MetadataMap) -> Option<Instant> {
    Instant::now().checked_add(parse(metadata.get("grpc-timeout")?.to_str().ok()?)?)
}

/// At most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_hours(number)),
        "M" => Some(Duration::from_mins(number)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_those_of_grpc() {
        assert_eq!(parse("2H"), Some(Duration::from_hours(2)));
        assert_eq!(parse("3M"), Some(Duration::from_mins(3)));
        assert_eq!(parse("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(parse("5m"), Some(Duration::from_millis(5)));
        assert_eq!(parse("5u"), Some(Duration::from_micros(5)));
        assert_eq!(parse("5n"), Some(Duration::from_nanos(5)));
        for bad in ["", "S", "5", "5s", "-5S", "+5S", "100000000S", "5é"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_not_said_is_no_deadline() {
        let mut metadata = MetadataMap::new();
        assert_eq!(of(&metadata), None);
        metadata.insert("grpc-timeout", "10S".parse().unwrap());
        assert!(of(&metadata).unwrap() > Instant::now());
    }
}
