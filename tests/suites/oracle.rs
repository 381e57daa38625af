//! The packet cases on the real kube-proxy in nftables mode: they prove the table right.

use weir_tests::{runner::run_cases, subject::Kind};

#[test]
fn every_packet_case_passes_on_kube_proxy() {
    let report = run_cases(Kind::KubeProxy).unwrap();
    report.print();
    report.verdict().unwrap();
}
