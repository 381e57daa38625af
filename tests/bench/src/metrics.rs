//! A subject's own counters.
//!
//! In: its metrics page. Out: how long it has been programming the kernel so far.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, ensure};

use weir_tests::netns::Namespace;

/// The port of the page by default, for all subjects.
const PORT: u16 = 10249;
const SUM: &str = "kubeproxy_sync_proxy_rules_duration_seconds_sum";

/// Seconds spent in syncs since the subject started.
pub(super) fn sync_seconds(node: &Namespace) -> anyhow::Result<f64> {
    sum(&node.run(page).context("asking for metrics")?)
}

fn page() -> anyhow::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // The old version keeps the answer in one piece and ends it by closing.
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    ensure!(page.lines().next().is_some_and(|status| status.contains(" 200 ")), "{page}");
    Ok(page)
}

/// The sum for IPv4, which is all that the benchmark has, or the one that is not split by family.
fn sum(page: &str) -> anyhow::Result<f64> {
    let line = page
        .lines()
        .filter_map(|line| line.strip_prefix(SUM))
        .find(|rest| rest.starts_with(' ') || rest.contains("\"IPv4\""));
    let value = line.and_then(|rest| rest.split_whitespace().next_back());
    Ok(value.with_context(|| format!("no {SUM}"))?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_found_with_and_without_families() {
        let split = format!(
            "# HELP {SUM} x\n{SUM}{{ip_family=\"IPv6\"}} 9\n{SUM}{{ip_family=\"IPv4\"}} 0.25\n{SUM}_other 1\n"
        );
        assert_eq!(sum(&split).unwrap(), 0.25);
        assert_eq!(sum(&format!("a 1\n{SUM} 1.5e-3\n")).unwrap(), 0.0015);
        assert!(sum("a 1\n").is_err());
    }
}
