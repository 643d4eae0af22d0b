//! A page of a pod.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

const WITHIN: Duration = Duration::from_secs(10);

/// The body of a page that answers 200.
pub fn get(address: &str, path: &str) -> Result<String> {
    let page = || format!("http://{address}{path}");
    let parsed: SocketAddr = address.parse().with_context(page)?;
    let mut stream = TcpStream::connect_timeout(&parsed, WITHIN).with_context(page)?;
    stream.set_read_timeout(Some(WITHIN)).with_context(page)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).with_context(page)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(page)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200"), "{}: {status}", page());
    Ok(body.to_owned())
}

/// The sum of a metric over its labels, of those lines that contain `with`.
pub fn metric(page: &str, name: &str, with: &str) -> Option<f64> {
    let mut sum = None;
    for line in page.lines().filter(|line| line.starts_with(name) && line.contains(with)) {
        let rest = &line[name.len()..];
        if rest.starts_with([' ', '{'])
            && let Some(value) = rest.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok())
        {
            *sum.get_or_insert(0.0) += value;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_by_name() {
        let page =
            "# HELP a_total x\na_total{call=\"x\"} 1\na_total{call=\"y\"} 2.5\na_total_more 9\nb 4e7\n";
        assert_eq!(metric(page, "a_total", ""), Some(3.5));
        assert_eq!(metric(page, "a_total", "\"y\""), Some(2.5));
        assert_eq!((metric(page, "b", ""), metric(page, "c", "")), (Some(4e7), None));
    }
}
