//! Times as people write them.

use std::time::Duration;

/// "2s", "500ms", "1.5m"; `None` for anything else, and for 0.
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|one: char| !one.is_ascii_digit() && one != '.')?;
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    let duration = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
    (!duration.is_zero()).then_some(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_number_and_a_unit() {
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("1.5m"), Some(Duration::from_secs(90)));
        for wrong in
            ["", "2", "s", "2 s", "-1s", "0s", "0.0ms", "2h", "1.2.3s", "1e3s", "99999999999999999999m"]
        {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
    }
}
