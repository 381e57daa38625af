//! NodePorts cannot be taken: a process in the host's network namespace that binds one would wait for connections which
//! the frontend gets. And a pod that binds a Service's address is remembered.
//!
//! In: a socket that has just been bound. Out: a refusal, if this address and port is a NodePort's; or one more in `homes`.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval},
    programs::SockContext,
};
use proxy_ebpf::{Address, Settings};

use super::{
    ALLOW, home, maps, resolve,
    socket::{self, Family, MAPPED, TCP, UDP},
};

const REFUSE: i32 = 0;
const EADDRINUSE: i32 = 98;

/// A socket was bound to an address and a port.
#[inline(always)]
pub(super) fn bound(context: &SockContext, family: Family) -> i32 {
    let Some(settings) = maps::SETTINGS.get(Settings::PLANE) else { return ALLOW };
    // SAFETY: the kernel hands every program of this kind a valid context; the verifier checks each access.
    let socket = unsafe { &*context.sock };
    let protocol = socket.protocol;
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    // SAFETY: the context is valid, and the helper only reads it.
    let namespace = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    let address = match family {
        Family::V4 => [0, 0, MAPPED, socket.src_ip4],
        // Volatile, because the verifier accepts single words of a socket's address only.
        // SAFETY: as above.
        Family::V6 => unsafe {
            [
                (&raw const socket.src_ip6[0]).read_volatile(),
                (&raw const socket.src_ip6[1]).read_volatile(),
                (&raw const socket.src_ip6[2]).read_volatile(),
                (&raw const socket.src_ip6[3]).read_volatile(),
            ]
        },
    };
    // A port in the host's order, unlike everywhere else.
    let port = (socket.src_port as u16).to_be();
    if namespace != socket::host(settings.host) {
        note_home(context, namespace, &address, port, protocol);
        return ALLOW;
    }
    if is_taken(&address, port, protocol) { refuse() } else { ALLOW }
}

/// A pod that binds a Service's own address answers there itself, to whoever asks in the same pod.
#[inline(always)]
fn note_home(context: &SockContext, namespace: u64, address: &Address, port: u16, protocol: u32) {
    if resolve::is_frontend(address, port, protocol) {
        home::note(context, namespace);
    }
}

#[inline(always)]
fn is_taken(address: &Address, port: u16, protocol: u32) -> bool {
    let all_v6 = (address[0] | address[1] | address[2] | address[3]) == 0;
    let v4 = socket::is_v4(address);
    if all_v6 || (v4 && address[3] == 0) {
        // An IPv6 socket on every address has the IPv4 ones too, unless it says that it does not want them, which is
        // not to be seen here.
        return resolve::is_node_port(v4, port, protocol);
    }
    resolve::is_on_node(address) && resolve::is_node_port(v4, port, protocol)
}

/// Says that the address is in use; where the kernel cannot, it says that it is not permitted.
#[inline(always)]
fn refuse() -> i32 {
    if maps::can_refuse() {
        // SAFETY: sets what the system call is to return, nothing else.
        unsafe { bpf_set_retval(-EADDRINUSE) };
    }
    REFUSE
}
