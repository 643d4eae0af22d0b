//! `datetime.strftime` in the C locale and UTC, as far as chat templates use it.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Fails on a directive it does not know, naming it.
pub(super) fn format(format: &str, now: SystemTime) -> Result<String, String> {
    let time = Time::new(now);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let padded = directive != Some('-');
        if !padded {
            directive = characters.next();
        }
        let text = match directive {
            Some('d') => time.day.pad(2),
            Some('m') => time.month.pad(2),
            Some('y') => (time.year % 100).pad(2),
            Some('H') => time.hour.pad(2),
            Some('I') => (if time.hour.is_multiple_of(12) { 12 } else { time.hour % 12 }).pad(2),
            Some('M') => time.minute.pad(2),
            Some('S') => time.second.pad(2),
            Some('j') => time.day_of_year.pad(3),
            Some('Y') => time.year.pad(4),
            Some('B') => MONTHS[time.month as usize - 1].to_owned(),
            Some('b') => MONTHS[time.month as usize - 1][..3].to_owned(),
            Some('A') => DAYS[time.weekday as usize].to_owned(),
            Some('a') => DAYS[time.weekday as usize][..3].to_owned(),
            Some('p') => if time.hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(format!("strftime_now does not know %{other}")),
            None => return Err("strftime_now got a format that ends in %".to_owned()),
        };
        if padded {
            out.push_str(&text);
        } else {
            let short = text.trim_start_matches('0');
            out.push_str(if short.is_empty() { "0" } else { short });
        }
    }
    Ok(out)
}

trait Pad {
    fn pad(self, width: usize) -> String;
}

impl Pad for u64 {
    fn pad(self, width: usize) -> String {
        format!("{self:0width$}")
    }
}

struct Time {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    day_of_year: u64,
    /// From Sunday.
    weekday: u64,
}

impl Time {
    /// Days to a date of the Gregorian calendar in years that begin in March, so that the leap day comes last. Times before
    /// 1970 are taken as its beginning.
    fn new(now: SystemTime) -> Self {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let days = seconds / 86_400;
        // From 0000-03-01; an era has 400 years.
        let shifted = days + 719_468;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_march_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_march_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = shifted / 146_097 * 400 + year_of_era + u64::from(month <= 2);
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let before_march = 59 + u64::from(leap);
        Self {
            year,
            month,
            day: day_of_march_year - (153 * march_month + 2) / 5 + 1,
            hour: seconds / 3_600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
            day_of_year: if month <= 2 {
                day_of_march_year - 305
            } else {
                day_of_march_year + before_march + 1
            },
            weekday: (days + 4) % 7,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Expected values are from GNU `date -u`.
    #[test]
    fn formats_as_date_does() {
        const ALL: &str = "%a %A %b %B %d %-d %m %y %Y %H %I %M %S %p %j %%";
        for (seconds, expected) in [
            (0, "Thu Thursday Jan January 01 1 01 70 1970 00 12 00 00 AM 001 %"),
            (951_782_399, "Mon Monday Feb February 28 28 02 00 2000 23 11 59 59 PM 059 %"),
            (951_868_800, "Wed Wednesday Mar March 01 1 03 00 2000 00 12 00 00 AM 061 %"),
            (1_795_478_400, "Tue Tuesday Nov November 24 24 11 26 2026 00 12 00 00 AM 328 %"),
            (4_107_542_400, "Mon Monday Mar March 01 1 03 00 2100 00 12 00 00 AM 060 %"),
            (1_735_689_599, "Tue Tuesday Dec December 31 31 12 24 2024 23 11 59 59 PM 366 %"),
        ] {
            assert_eq!(format(ALL, UNIX_EPOCH + Duration::from_secs(seconds)).unwrap(), expected);
        }
    }

    #[test]
    fn an_unknown_directive_is_named() {
        assert!(format("%Q", UNIX_EPOCH).unwrap_err().contains("%Q"));
        assert!(format("50%", UNIX_EPOCH).is_err());
    }
}
