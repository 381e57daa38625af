use super::*;

/// The metrics after each call.
fn used() -> String {
    let metrics = Metrics::new();
    metrics.service_changed();
    metrics.endpoints_changed();
    metrics.set_pending(2, 3);
    for family in Family::ALL {
        metrics.queued(family);
        metrics.synced(family, true, Duration::from_millis(3));
        metrics.synced(family, false, Duration::from_millis(1));
        metrics.network_programmed(family, Duration::from_millis(300));
        metrics.no_local_endpoints(family, TrafficPolicy::External, 4);
        metrics.sync_failed(family);
        metrics.conntrack_cleaned(family, Duration::from_millis(2), 5);
    }
    metrics.healthz_answered(false);
    metrics.livez_answered(true);
    metrics.count_request("GET", "192.0.2.1:6443", Some(200), Duration::from_millis(3));
    metrics.count_request("GET", "192.0.2.1:6443", None, Duration::from_millis(3));
    let count = |port: &str, served, refused| PortCount {
        namespace: "shop".to_owned(),
        service: "cart".to_owned(),
        port: port.to_owned(),
        protocol: "TCP".to_owned(),
        served,
        refused,
    };
    // The first port has two families; no client used the last port.
    metrics.count_services(move || {
        vec![count("http", 2, 0), count("http", 3, 1), count("", 0, 4), count("grpc", 0, 0)]
    });
    metrics.count_drops(|| {
        let count = |family, packets| DropCount { family, reason: "no-endpoints", packets };
        vec![count(Family::V4, 3), count(Family::V6, 0)]
    });
    metrics.show_silences(|| vec![("Service", Duration::from_millis(1500))]);
    metrics.show_silences(|| vec![("Pod", Duration::from_secs(40))]);
    metrics.set_size(1, 2, 3);
    metrics.changes_applied(7);
    metrics.reconciled("start");
    metrics.render()
}

fn bounds(text: &str, series: &str) -> Vec<String> {
    let start = format!("{series}_bucket{{le=\"");
    let bound =
        |line: &str| Some(line.strip_prefix(&start)?.split_once("\",ip_family=\"IPv4\"}")?.0.to_owned());
    text.lines().filter_map(bound).collect()
}

#[test]
fn names_and_types_are_kube_proxys() {
    let text = used();
    let types: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    insta::assert_snapshot!(types.join("\n"), @r"
        rest_client_requests_total counter
        rest_client_request_duration_seconds histogram
        weir_service_connections_total counter
        weir_service_refusals_total counter
        weir_dropped_packets_total counter
        weir_watch_silence_seconds gauge
        process_cpu_seconds_total counter
        process_start_time_seconds gauge
        process_resident_memory_bytes gauge
        process_virtual_memory_bytes gauge
        process_open_fds gauge
        process_max_fds gauge
        kubeproxy_sync_proxy_rules_duration_seconds histogram
        kubeproxy_sync_full_proxy_rules_duration_seconds histogram
        kubeproxy_sync_partial_proxy_rules_duration_seconds histogram
        kubeproxy_sync_proxy_rules_last_timestamp_seconds gauge
        kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds gauge
        kubeproxy_network_programming_duration_seconds histogram
        kubeproxy_sync_proxy_rules_endpoint_changes_pending gauge
        kubeproxy_sync_proxy_rules_endpoint_changes_total counter
        kubeproxy_sync_proxy_rules_service_changes_pending gauge
        kubeproxy_sync_proxy_rules_service_changes_total counter
        kubeproxy_sync_proxy_rules_no_local_endpoints_total gauge
        kubeproxy_sync_proxy_rules_nftables_sync_failures_total counter
        kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total counter
        kubeproxy_proxy_healthz_total counter
        kubeproxy_proxy_livez_total counter
        kubeproxy_nftables_localhost_nodeport_listeners gauge
        kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total counter
        kubeproxy_conntrack_reconciler_sync_duration_seconds histogram
        kubeproxy_conntrack_reconciler_deleted_entries_total counter
        weir_build_info gauge
        weir_services gauge
        weir_frontends gauge
        weir_backends gauge
        weir_unprogrammed_ports gauge
        weir_changes_applied_total counter
        weir_events_dropped_total counter
        weir_reconciles_total counter
        weir_sockets_moved_total counter
        weir_programs_attached_anew_total counter
        weir_bypassed_pods_waiting gauge
        weir_dns_answered_addresses gauge
        weir_ports_left_to_packets gauge
    ");
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"));
}

#[test]
fn labels_and_values_are_kube_proxys() {
    let text = used();
    for line in [
        "kubeproxy_sync_proxy_rules_service_changes_total 1",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 1",
        "kubeproxy_sync_proxy_rules_service_changes_pending 2",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 3",
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 2",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"} 4",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv6\"} 1",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 5",
        "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
        "kubeproxy_proxy_livez_total{code=\"200\"} 1",
        "weir_reconciles_total{reason=\"start\"} 1",
        "weir_changes_applied_total 7",
        "weir_watch_silence_seconds{kind=\"Service\"} 1.5",
        "weir_watch_silence_seconds{kind=\"Pod\"} 40.0",
        "rest_client_requests_total{code=\"200\",host=\"192.0.2.1:6443\",method=\"GET\"} 1",
        "rest_client_requests_total{code=\"<error>\",host=\"192.0.2.1:6443\",method=\"GET\"} 1",
        "rest_client_request_duration_seconds_bucket{le=\"0.005\",host=\"192.0.2.1:6443\",verb=\"GET\"} 2",
        "weir_service_connections_total{namespace=\"shop\",port=\"http\",protocol=\"TCP\",service=\"cart\"} 5",
        "weir_service_refusals_total{namespace=\"shop\",port=\"http\",protocol=\"TCP\",service=\"cart\"} 1",
        "weir_dropped_packets_total{ip_family=\"IPv4\",reason=\"no-endpoints\"} 3",
        "weir_dropped_packets_total{ip_family=\"IPv6\",reason=\"no-endpoints\"} 0",
        "weir_service_refusals_total{namespace=\"shop\",port=\"\",protocol=\"TCP\",service=\"cart\"} 4",
    ] {
        assert!(text.lines().any(|it| it == line), "{line} is missing from\n{text}");
    }
}

#[test]
fn an_unused_port_has_no_series() {
    assert!(!used().contains("port=\"grpc\""));
}

#[test]
fn buckets_are_kube_proxys() {
    let text = used();
    let hist15 =
        "0.001 0.002 0.004 0.008 0.016 0.032 0.064 0.128 0.256 0.512 1.024 2.048 4.096 8.192 16.384 +Inf";
    for series in [
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds",
    ] {
        assert_eq!(bounds(&text, series).join(" "), hist15, "{series}");
    }
    let programming = bounds(&text, "kubeproxy_network_programming_duration_seconds");
    assert_eq!(programming.len(), 2 + 59 + 12 + 7 + 1);
    assert_eq!(programming[..4], ["0.25", "0.5", "1", "2"]);
    assert_eq!(programming[60..64], ["59", "60", "65", "70"]);
    assert_eq!(programming[72..], ["115", "120", "150", "180", "210", "240", "270", "300", "+Inf"]);
}

#[test]
fn the_dashboard_uses_metrics_that_exist() {
    let (text, dashboard) = (used(), include_str!("../../../../charts/weir/dashboards/weir.json"));
    let words = dashboard.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let asked =
        words.filter(|word| ["kubeproxy_", "weir_", "process_"].iter().any(|it| word.starts_with(it)));
    let unknown: Vec<&str> = asked
        .filter(|name| !text.contains(&format!("# TYPE {} ", name.trim_end_matches("_bucket"))))
        .collect();
    assert!(dashboard.contains("weir_") && unknown.is_empty(), "{unknown:?}");
}

#[test]
fn the_process_is_described() {
    let text = used();
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
    };
    assert!(value("process_resident_memory_bytes ") > 1e5);
    assert!(value("process_virtual_memory_bytes ") >= value("process_resident_memory_bytes "));
    assert!(value("process_open_fds ") >= 3.0);
    assert!(value("process_cpu_seconds_total ") >= 0.0);
    let age = seconds_now() - value("process_start_time_seconds ");
    assert!((0.0..86_400.0).contains(&age), "{age}");
}
