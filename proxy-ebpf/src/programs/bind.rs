//! Sockets that a pod binds to a Service's address. Such a pod serves that address itself for the clients in
//! it.
//!
//! In: a socket that a process has bound. Out: one more in `homes`, if its address and port are a Service's.
//! The program never refuses a bind. A process of the host may bind the number of a NodePort, as it may
//! beside kube-proxy: the kernel assigns such numbers to clients too, and a server in the host's network may
//! listen on the number of its own NodePort.

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_get_netns_cookie, programs::SockContext};
use proxy_ebpf::Settings;

use super::{
    ALLOW, home, maps, resolve,
    socket::{self, Family, TCP, UDP},
};

/// The hooks `post_bind4` and `post_bind6`.
#[inline(always)]
pub(super) fn bound(context: &SockContext, family: Family) -> i32 {
    let Some(settings) = maps::SETTINGS.get(Settings::PLANE) else { return ALLOW };
    // SAFETY: the kernel gives every program of this type a valid context; the verifier checks each access.
    let bound = unsafe { &*context.sock };
    let protocol = bound.protocol;
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    // SAFETY: the context is valid, and the helper only reads it.
    let namespace = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    // SAFETY: as above.
    let address = unsafe { socket::own_address(family, &raw const bound.src_ip4, &raw const bound.src_ip6) };
    // This field is in the host's byte order, unlike all others.
    let port = (bound.src_port as u16).to_be();
    if namespace != socket::host(settings.host) && resolve::is_frontend(&address, port, protocol) {
        home::count(context, namespace);
    }
    ALLOW
}
