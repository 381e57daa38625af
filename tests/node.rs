//! The packet cases on weir's data planes.

use anyhow::Result;
use weir_tests::{
    runner::run_cases,
    subject::{Kind, Plane},
};

fn gives_every_packet_case_its_due(plane: Plane) -> Result<()> {
    let report = run_cases(Kind::Weir(plane))?;
    report.print();
    report.verdict()
}

#[test]
fn nftables_gives_every_packet_case_its_due() -> Result<()> {
    gives_every_packet_case_its_due(Plane::Nftables)
}

#[test]
fn ebpf_gives_every_packet_case_its_due() -> Result<()> {
    gives_every_packet_case_its_due(Plane::Ebpf)
}
