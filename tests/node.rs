//! The packet cases on weir's nftables data plane.

use weir_tests::{
    runner::run_cases,
    subject::{Kind, Plane},
};

#[test]
fn weir_gives_every_packet_case_its_due() {
    let report = run_cases(Kind::Weir(Plane::Nftables)).unwrap();
    report.print();
    report.verdict().unwrap();
}
