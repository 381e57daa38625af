//! Prometheus' older text format, which kube-proxy serves.
//!
//! In: OpenMetrics, as the metrics library writes it. Out: version 0.0.4 of the text format.

/// Translates OpenMetrics to the older format, so that names and bounds equal kube-proxy's. OpenMetrics names counters
/// without `_total` and writes `1.0` for a bucket of 1.
pub(super) fn plain(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                _ => ("", kind),
            };
            if let Some((_, words)) = help.take() {
                text += &format!("# HELP {name}{suffix} {words}\n");
            }
            text += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            text += &bound_without_fraction(line);
            text.push('\n');
        }
    }
    text
}

fn bound_without_fraction(line: &str) -> std::borrow::Cow<'_, str> {
    match line.split_once("le=\"").and_then(|(before, rest)| Some((before, rest.split_once(".0\"")?))) {
        Some((before, (bound, after))) if !bound.contains('"') => {
            format!("{before}le=\"{bound}\"{after}").into()
        }
        _ => line.into(),
    }
}
