//! A pod that binds a Service's own address answers there itself, to the processes that ask in the same pod.
//!
//! In: a socket that has just been bound. Out: one more in `homes`, if its address and port are a Service's. No bind is
//! refused: a process of the host may have the number of a NodePort, as beside kube-proxy, because the kernel hands such
//! numbers out to clients too, and a server in the host's network may have the same number as its own NodePort.

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_get_netns_cookie, programs::SockContext};
use proxy_ebpf::Settings;

use super::{
    ALLOW, home, maps, resolve,
    socket::{self, Family, TCP, UDP},
};

/// A socket was bound to an address and a port.
#[inline(always)]
pub(super) fn bound(context: &SockContext, family: Family) -> i32 {
    let Some(settings) = maps::SETTINGS.get(Settings::PLANE) else { return ALLOW };
    // SAFETY: the kernel hands every program of this kind a valid context; the verifier checks each access.
    let bound = unsafe { &*context.sock };
    let protocol = bound.protocol;
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    // SAFETY: the context is valid, and the helper only reads it.
    let namespace = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    // SAFETY: as above.
    let address = unsafe { socket::own_address(family, &raw const bound.src_ip4, &raw const bound.src_ip6) };
    // A port in the host's order, unlike everywhere else.
    let port = (bound.src_port as u16).to_be();
    if namespace != socket::host(settings.host) && resolve::is_frontend(&address, port, protocol) {
        home::note(context, namespace);
    }
    ALLOW
}
