//! What the programs say when somebody wants to follow them.
//!
//! In: what was just done for a socket. Out: a message in a ring buffer the agent logs from. At any other level than trace
//! the kernel drops all of this when it loads the programs, because the level is a constant by then.

use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::trace;
use proxy_ebpf::Endpoint;

/// A socket was led from a Service to a backend. A function of its own in the kernel too, for the sake of its stack.
#[inline(never)]
pub(super) fn led(context: &SockAddrContext, service: &Endpoint, backend: &Endpoint) {
    trace!(
        context,
        "{:i} port {} leads to {:i} port {}",
        bytes(service),
        service.port(),
        bytes(backend),
        backend.port()
    );
}

/// A socket was refused.
#[inline(never)]
pub(super) fn refused(context: &SockAddrContext, service: &Endpoint) {
    trace!(context, "{:i} port {} refuses", bytes(service), service.port());
}

#[inline(always)]
fn bytes(endpoint: &Endpoint) -> [u8; 16] {
    let [a, b, c, d] = endpoint.address;
    (u128::from(a) | u128::from(b) << 32 | u128::from(c) << 64 | u128::from(d) << 96).to_le_bytes()
}
