//! The HTTP paths that kube-proxy serves on its metrics port (P5 to P7).
//!
//! In: the metrics, the configuration and the flags of this agent. Out: `/metrics`, `/metrics/slis`, `/proxyMode`,
//! `/healthz`, `/configz`, `/flagz` and `/statusz`.

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    http::header::{self, HeaderName},
    routing::{any, delete},
};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Metrics, indicators::Indicators};

const TEXT: (HeaderName, &str) = (header::CONTENT_TYPE, "text/plain; charset=utf-8");
const JSON: (HeaderName, &str) = (header::CONTENT_TYPE, "application/json");
const METRICS: (HeaderName, &str) = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
const NOSNIFF: (HeaderName, &str) = (header::X_CONTENT_TYPE_OPTIONS, "nosniff");

const PATHS: &str = "/configz /flagz /healthz /metrics /metrics/slis /proxyMode /statusz";

/// Facts about this agent that the pages show.
#[derive(Clone, Debug)]
pub struct About {
    /// The name of the data plane that serves now.
    pub proxy_mode: watch::Receiver<&'static str>,
    /// The configuration in kube-proxy's format.
    pub configuration: Value,
    /// The arguments of the command line, without the program's name.
    pub words: Vec<String>,
}

/// Answers the paths of this page, whatever the method.
pub fn admin_router(metrics: &Metrics, about: About) -> Router {
    let About { proxy_mode, configuration, words } = about;
    let metrics = metrics.clone();
    let (counted, shown, forgotten) = {
        let indicators = Indicators::new();
        (indicators.clone(), indicators.clone(), indicators)
    };
    let healthz = move || {
        counted.pinged();
        std::future::ready(([TEXT, NOSNIFF], "ok"))
    };
    let reset = move || {
        forgotten.reset();
        std::future::ready(([TEXT], "metrics reset\n"))
    };
    let indicators = move || std::future::ready(([METRICS], shown.render()));
    let configuration = Arc::from(json!({"kubeproxy.config.k8s.io": configuration}).to_string());
    let flags: Arc<str> = heading("flagz", &flags(&words)).into();
    let started = (Instant::now(), Timestamp::now());
    Router::new()
        .route("/metrics", any(move || rendered(metrics.clone())))
        .route("/metrics/slis", delete(reset).fallback(indicators))
        .route("/proxyMode", any(move || std::future::ready(([TEXT, NOSNIFF], *proxy_mode.borrow()))))
        .route("/healthz", any(healthz))
        .route("/configz", any(move || shared([JSON, NOSNIFF], &configuration)))
        .route("/flagz", any(move || shared([TEXT], &flags)))
        .route("/statusz", any(move || std::future::ready(([TEXT], status(started.0, started.1)))))
}

/// Renders on a blocking thread, because the counters of many Services are read from the kernel one by one.
async fn rendered(metrics: Metrics) -> ([(HeaderName, &'static str); 1], String) {
    let text = tokio::task::spawn_blocking(move || metrics.render()).await;
    ([METRICS], text.unwrap_or_default())
}

fn shared<const N: usize>(
    headers: [(HeaderName, &'static str); N],
    text: &Arc<str>,
) -> std::future::Ready<([(HeaderName, &'static str); N], String)> {
    std::future::ready((headers, text.to_string()))
}

fn heading(page: &str, text: &str) -> String {
    format!("\nweir {page}\nWarning: this page is for people; its format may change at any time.\n\n{text}")
}

fn status(started: Instant, since: Timestamp) -> String {
    let up = started.elapsed().as_secs();
    let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
    let version = env!("CARGO_PKG_VERSION");
    let text = format!(
        "Started: {since:.0}\nUp: {hours} hr {minutes:02} min {seconds:02} sec\nBinary version: {version}\nPaths: {PATHS}\n"
    );
    heading("statusz", &text)
}

/// The flags of the command line as `name=value`, one a line and sorted; a switch has the value `true`.
fn flags(words: &[String]) -> String {
    let mut lines = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix('-').map(|rest| rest.trim_start_matches('-')) else { continue };
        lines.push(match flag.split_once('=') {
            Some((name, value)) => format!("{name}={value}"),
            None => match words.next_if(|next| !next.starts_with('-')) {
                Some(value) => format!("{flag}={value}"),
                None => format!("{flag}=true"),
            },
        });
    }
    lines.sort_unstable();
    lines.into_iter().map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p7_flags_are_listed_as_given() {
        let words =
            ["run", "--config=/c", "--masquerade-all", "--hostname-override", "n1", "-v", "4", "--profiling"];
        assert_eq!(
            flags(&words.map(str::to_owned)),
            "config=/c\nhostname-override=n1\nmasquerade-all=true\nprofiling=true\nv=4\n"
        );
    }

    #[test]
    fn p7_the_status_page_shows_start_time_and_version() {
        let page = status(Instant::now(), Timestamp::from_second(1_000_000_000).unwrap());
        let (_, text) = page.split_once("\n\n").unwrap();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            text,
            format!(
                "Started: 2001-09-09T01:46:40Z\nUp: 0 hr 00 min 00 sec\nBinary version: {version}\nPaths: {PATHS}\n"
            )
        );
    }
}
