//! Trace messages of the programs.
//!
//! In: a translation or a refusal. Out: a message in a ring buffer, which the agent copies to its log at the
//! level trace (`-v 5`). At any other level the kernel removes this code when it loads the programs, because
//! the level is a constant by then.

use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::trace;
use proxy_ebpf::Endpoint;

/// A function of its own in the kernel too, because of its stack.
#[inline(never)]
pub(super) fn translated(context: &SockAddrContext, service: &Endpoint, backend: &Endpoint) {
    trace!(
        context,
        "{:i} port {}: translated to {:i} port {}",
        bytes(service),
        service.port(),
        bytes(backend),
        backend.port()
    );
}

/// As [`translated`].
#[inline(never)]
pub(super) fn refused(context: &SockAddrContext, service: &Endpoint) {
    trace!(context, "{:i} port {}: refused", bytes(service), service.port());
}

#[inline(always)]
fn bytes(endpoint: &Endpoint) -> [u8; 16] {
    let [a, b, c, d] = endpoint.address;
    (u128::from(a) | u128::from(b) << 32 | u128::from(c) << 64 | u128::from(d) << 96).to_le_bytes()
}
