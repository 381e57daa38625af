//! Servers, local pods, conntrack, request limit and OOM score.

use super::*;

#[test]
fn excluded_virtual_servers_are_kept_at_the_takeover() {
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
    let given = file("ipvs: {excludeCIDRs: [192.0.2.0/24, 'fd00:1::/64']}");
    assert_eq!(given.config.take_over, Some(networks(&["192.0.2.0/24", "fd00:1::/64"])));
    let flagged = flags("--ipvs-exclude-cidrs 192.0.2.7/32,fd00:1::/64").unwrap();
    assert_eq!(flagged.config.take_over, Some(networks(&["192.0.2.7/32", "fd00:1::/64"])));
    assert_eq!(flags("").unwrap().config.take_over, Some(Vec::new()));
    assert_eq!(flags("--take-over=false").unwrap().config.take_over, None);
}

#[test]
fn server_addresses_come_from_flags_and_fields_and_can_be_turned_off() {
    for (line, healthz, metrics) in [
        ("", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("--bind-address 192.0.2.1", "0.0.0.0:10256", "127.0.0.1:10249"),
        ("--bind-address ::1", "[::]:10256", "[::1]:10249"),
        ("--healthz-bind-address 192.0.2.1 --metrics-bind-address [::]:1", "192.0.2.1:10256", "[::]:1"),
        ("--healthz-bind-address 192.0.2.1 --healthz-port 8", "192.0.2.1:8", "127.0.0.1:10249"),
        ("--healthz-port 8 --metrics-port 9", "0.0.0.0:8", "127.0.0.1:9"),
        ("--healthz-port 0 --metrics-bind-address=", "", ""),
    ] {
        let config = flags(line).unwrap().config;
        let shown =
            [config.healthz, config.metrics].map(|it| it.map(|it| it.to_string()).unwrap_or_default());
        assert_eq!(shown, [healthz, metrics], "{line}");
    }
    let config = file("healthzBindAddress: 192.0.2.1\nmetricsBindAddress: '::'").config;
    assert_eq!(config.healthz.unwrap().to_string(), "192.0.2.1:10256");
    assert_eq!(config.metrics.unwrap().to_string(), "[::]:10249");
}

#[test]
fn each_detect_local_mode_reads_its_own_field() {
    for (line, detect_local) in [
        ("", DetectLocal::ClusterCidr(vec![])),
        ("--detect-local-mode NodeCIDR --cluster-cidr 10.0.0.1/8", DetectLocal::NodeCidr),
        ("--cluster-cidr 10.0.0.1/8", DetectLocal::ClusterCidr(vec!["10.0.0.0/8".parse().unwrap()])),
        (
            "--detect-local-mode BridgeInterface --pod-bridge-interface br0",
            DetectLocal::Bridge("br0".to_owned()),
        ),
        (
            "--detect-local-mode InterfaceNamePrefix --pod-interface-name-prefix veth",
            DetectLocal::InterfacePrefix("veth".to_owned()),
        ),
    ] {
        assert_eq!(flags(line).unwrap().config.model.detect_local, detect_local, "{line}");
    }
}

#[test]
fn conntrack_settings_have_kube_proxys_defaults_and_zero_keeps_the_kernels() {
    let defaults = "conntrack: {maxPerCore: 32768, min: 131072, tcpEstablishedTimeout: 24h, tcpCloseWaitTimeout: 1h0m0s}";
    let loaded = file(&format!("mode: nftables\n{defaults}"));
    assert_eq!(loaded.config.conntrack, flags("").unwrap().config.conntrack);
    assert_eq!(loaded.warnings, [""; 0]);

    let zeros = "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}";
    assert_eq!(file(zeros).config.conntrack, Conntrack::default());

    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let other = Conntrack {
        max_per_core: Some(1),
        min: 2,
        tcp_established_timeout: seconds(3),
        tcp_close_wait_timeout: seconds(4),
        tcp_be_liberal: true,
        udp_timeout: seconds(5),
        udp_stream_timeout: seconds(6),
    };
    let fields = "conntrack: {maxPerCore: 1, min: 2, tcpEstablishedTimeout: 3s, tcpCloseWaitTimeout: 4s, \
                  tcpBeLiberal: true, udpTimeout: 5s, udpStreamTimeout: 6s}";
    assert_eq!(file(fields).config.conntrack, other);
    let line = "--conntrack-max-per-core 1 --conntrack-min 2 --conntrack-tcp-timeout-established 3s \
                --conntrack-tcp-timeout-close-wait 4s --conntrack-tcp-be-liberal --conntrack-udp-timeout 5s \
                --conntrack-udp-timeout-stream 6s";
    assert_eq!(flags(line).unwrap().config.conntrack, other);
}

#[test]
fn there_is_a_request_limit_only_if_one_is_set() {
    let limit = |requests, millis| Some(RequestLimit { requests, window: Duration::from_millis(millis) });
    for (fields, expected) in [
        ("clientConnection: {qps: 0, burst: 0}", None),
        ("clientConnection: {burst: 100}", None),
        ("clientConnection: {qps: -1, burst: 100}", None),
        ("clientConnection: {qps: 5, burst: 0}", limit(10, 2000)),
        ("clientConnection: {qps: 2.5, burst: 5}", limit(5, 2000)),
    ] {
        assert_eq!(file(fields).config.request_limit, expected, "{fields}");
    }
    let config = flags("--kube-api-qps=50 --kube-api-burst=100").unwrap().config;
    assert_eq!(config.request_limit, limit(100, 2000));
}

#[test]
fn the_oom_score_comes_from_the_file_or_the_flag() {
    assert_eq!(file("oomScoreAdj: 0").config.oom_score_adj, Some(0));
    assert_eq!(flags("--oom-score-adj -500").unwrap().config.oom_score_adj, Some(-500));
}
