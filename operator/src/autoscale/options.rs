//! What the operator is told about scaling.

use std::time::Duration;

use clap::Args;
use herd_control::autoscale::Policy;

use super::prometheus::Prometheus;

/// There may be none.
#[derive(Clone, Debug)]
struct Address(Option<Prometheus>);

/// Of the autoscaler.
#[derive(Clone, Debug, Args)]
pub(crate) struct AutoscalerOptions {
    /// Where Prometheus is, at `http://HOST[:PORT][/PATH]`; without it pools stay as they are
    #[arg(long, env = "HERD_PROMETHEUS", value_name = "URL", default_value = "", value_parser = prometheus)]
    prometheus: Address,
    /// How often Prometheus scrapes workers
    #[arg(long, env = "HERD_PROMETHEUS_SCRAPE_INTERVAL", default_value = "15s", value_parser = time)]
    prometheus_scrape_interval: Duration,
    /// Between two decisions
    #[arg(long, env = "HERD_AUTOSCALER_INTERVAL", default_value = "5s", value_parser = time)]
    autoscaler_interval: Duration,
    /// Load that asks for more gangs has to last so long
    #[arg(long, env = "HERD_AUTOSCALER_UP_AFTER", default_value = "15s", value_parser = time)]
    autoscaler_up_after: Duration,
    /// Load that asks for fewer gangs has to last so long, for each that goes
    #[arg(long, env = "HERD_AUTOSCALER_DOWN_WINDOW", default_value = "5m", value_parser = time)]
    autoscaler_down_window: Duration,
}

impl AutoscalerOptions {
    pub(super) fn policy(&self) -> Policy {
        let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        Policy {
            interval_ms: ms(self.autoscaler_interval),
            scrape_interval_ms: ms(self.prometheus_scrape_interval),
            up_after_ms: ms(self.autoscaler_up_after),
            down_window_ms: ms(self.autoscaler_down_window),
        }
    }

    pub(super) fn prometheus(&self) -> Option<Prometheus> {
        self.prometheus.0.clone()
    }
}

fn prometheus(text: &str) -> Result<Address, String> {
    if text.is_empty() {
        return Ok(Address(None));
    }
    Prometheus::new(text).map(|there| Address(Some(there))).map_err(|error| error.to_string())
}

fn time(text: &str) -> Result<Duration, String> {
    let allowed = Duration::from_millis(100)..=Duration::from_hours(1);
    let time = herd_control::duration(text).filter(|time| allowed.contains(time));
    time.ok_or_else(|| "give a time from \"100ms\" to \"60m\"".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        options: AutoscalerOptions,
    }

    #[test]
    fn what_is_given_is_checked() {
        let options = |arguments: &[&str]| {
            let arguments = ["operator"].into_iter().chain(arguments.iter().copied());
            Command::try_parse_from(arguments).map(|command| command.options)
        };
        let default = options(&[]).unwrap();
        assert!(default.prometheus().is_none());
        assert_eq!((default.policy().interval_ms, default.policy().down_window_ms), (5_000, 300_000));
        assert!(options(&["--prometheus="]).unwrap().prometheus().is_none());
        assert!(options(&["--prometheus=http://p:9090"]).unwrap().prometheus().is_some());
        assert!(options(&["--prometheus=p:9090"]).is_err());
        assert!(options(&["--autoscaler-interval=0s"]).is_err());
        let short = options(&["--autoscaler-down-window=8s"]).unwrap();
        assert_eq!(short.policy().down_window_ms, 8_000);
    }
}
