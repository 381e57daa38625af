//! Access to a hook's context: the socket, its addresses and its client.
//!
//! In: a hook's context. Out: addresses in the form of the maps, and the client.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        bpf_sock_addr, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Ipv4Tuple,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Ipv6Tuple,
    },
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_lookup_tcp,
        bpf_sk_lookup_udp, bpf_sk_release,
    },
    programs::SockAddrContext,
};
use proxy_ebpf::{Address, Endpoint, Settings};

use super::{
    home,
    maps::{BYPASSED, SETTINGS},
};

pub(super) const TCP: u32 = 6;
pub(super) const UDP: u32 = 17;

/// The third of four words of every IPv4-mapped address.
pub(super) const MAPPED: u32 = 0xffff_u32.to_be();

/// The last word of `127.0.0.1`.
const LOOPBACK_V4: u32 = 0x7f00_0001_u32.to_be();
/// The last word of `::1`.
const LOOPBACK: u32 = 1_u32.to_be();

/// Which of its two hooks runs.
#[derive(Clone, Copy)]
pub(super) enum Family {
    V4,
    V6,
}

#[inline(always)]
pub(super) fn is_v4(address: &Address) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// Copies an endpoint from a map, word by word. As one assignment it becomes a call of `memmove`, whose loop
/// over bytes makes the verifier of every kernel give up (`BPF program is too large`) when several calls
/// follow each other.
///
/// # Safety
///
/// The endpoint must be readable.
#[inline(always)]
pub(super) unsafe fn read_endpoint(from: *const Endpoint) -> Endpoint {
    // SAFETY: the caller's promise.
    unsafe {
        Endpoint {
            address: [
                (&raw const (*from).address[0]).read_volatile(),
                (&raw const (*from).address[1]).read_volatile(),
                (&raw const (*from).address[2]).read_volatile(),
                (&raw const (*from).address[3]).read_volatile(),
            ],
            port: (&raw const (*from).port).read_volatile(),
            zero: 0,
        }
    }
}

/// Compares word by word, because the compiler would emit a function call for arrays.
#[inline(always)]
pub(super) fn same(a: &Endpoint, b: &Endpoint) -> bool {
    a.port == b.port && same_address(&a.address, &b.address)
}

#[inline(always)]
pub(super) fn same_address(a: &Address, b: &Address) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// The address that the hook handles: a destination, or a source to show. The unspecified address (`0.0.0.0`,
/// `::`, and the IPv4-mapped form of the first) means the client itself, as it does to the kernel, so this
/// returns the loopback address for it.
#[inline(always)]
pub(super) fn address(context: &SockAddrContext, family: Family) -> Endpoint {
    // SAFETY: the kernel gives every program of this type a valid context; the verifier checks each access.
    let user = unsafe { &*context.sock_addr };
    let mut address = match family {
        Family::V4 => [0, 0, MAPPED, user.user_ip4],
        Family::V6 => [user.user_ip6[0], user.user_ip6[1], user.user_ip6[2], user.user_ip6[3]],
    };
    if address[3] == 0 && (address[0] | address[1]) == 0 {
        match address[2] {
            0 => address[3] = LOOPBACK,
            MAPPED => address[3] = LOOPBACK_V4,
            _ => {}
        }
    }
    Endpoint { address, port: user.user_port as u16, zero: 0 }
}

/// Whether a datagram's socket is bound to the address that it sends to.
#[inline(always)]
pub(super) fn sends_to_itself(context: &SockAddrContext, family: Family) -> bool {
    let user: *const bpf_sock_addr = context.sock_addr;
    // SAFETY: as in `address`; the hooks of sendmsg, which call this, have a source. Volatile, because the
    // verifier accepts only single words.
    unsafe {
        let is = |from: *const u32, to: *const u32| from.read_volatile() == to.read_volatile();
        match family {
            Family::V4 => is(&raw const (*user).msg_src_ip4, &raw const (*user).user_ip4),
            Family::V6 => {
                is(&raw const (*user).msg_src_ip6[0], &raw const (*user).user_ip6[0])
                    && is(&raw const (*user).msg_src_ip6[1], &raw const (*user).user_ip6[1])
                    && is(&raw const (*user).msg_src_ip6[2], &raw const (*user).user_ip6[2])
                    && is(&raw const (*user).msg_src_ip6[3], &raw const (*user).user_ip6[3])
            }
        }
    }
}

/// All of 127.0.0.0/8 counts.
#[inline(always)]
fn is_loopback(address: &Address) -> bool {
    const NETWORK: u32 = 0xff00_0000_u32.to_be();
    const LOOPBACK_NETWORK: u32 = 0x7f00_0000_u32.to_be();
    if is_v4(address) {
        return address[3] & NETWORK == LOOPBACK_NETWORK;
    }
    (address[0] | address[1] | address[2]) == 0 && address[3] == LOOPBACK
}

/// Reads an address of a socket or of a hook's context, of which only the part of its family may be read.
/// Volatile, because the verifier accepts only single words and the compiler would join them.
///
/// # Safety
///
/// The part of this family must be readable.
#[inline(always)]
pub(super) unsafe fn own_address(family: Family, v4: *const u32, v6: *const [u32; 4]) -> Address {
    let words: *const u32 = v6.cast();
    // SAFETY: the caller's promise; four words follow each other.
    unsafe {
        match family {
            Family::V4 => [0, 0, MAPPED, v4.read_volatile()],
            Family::V6 => [
                words.read_volatile(),
                words.add(1).read_volatile(),
                words.add(2).read_volatile(),
                words.add(3).read_volatile(),
            ],
        }
    }
}

/// Whether the socket is bound to a loopback address and the backend is elsewhere. The kernel sends nothing
/// out with such a source, so the process gets the same error as without weir.
#[inline(always)]
pub(super) fn cannot_reach(context: &SockAddrContext, family: Family, backend: &Endpoint) -> bool {
    // SAFETY: as in `is_connected`.
    let own = unsafe {
        let socket = (*context.sock_addr).__bindgen_anon_1.sk;
        if socket.is_null() {
            return false;
        }
        own_address(family, &raw const (*socket).src_ip4, &raw const (*socket).src_ip6)
    };
    is_loopback(&own) && !is_loopback(&backend.address)
}

/// The same for a datagram, by its source.
#[inline(always)]
pub(super) fn cannot_send(context: &SockAddrContext, family: Family, backend: &Endpoint) -> bool {
    let user: *const bpf_sock_addr = context.sock_addr;
    // SAFETY: as in `sends_to_itself`.
    let own = unsafe { own_address(family, &raw const (*user).msg_src_ip4, &raw const (*user).msg_src_ip6) };
    is_loopback(&own) && !is_loopback(&backend.address)
}

/// Replaces the address that the hook handles.
#[inline(always)]
pub(super) fn set_address(context: &SockAddrContext, family: Family, to: &Endpoint) {
    // SAFETY: as in `address`; no other reference to the context exists while this one does. Volatile,
    // because the verifier accepts only single words and the compiler would join them.
    unsafe {
        let user: *mut bpf_sock_addr = context.sock_addr;
        match family {
            Family::V4 => (&raw mut (*user).user_ip4).write_volatile(to.address[3]),
            Family::V6 => {
                (&raw mut (*user).user_ip6[0]).write_volatile(to.address[0]);
                (&raw mut (*user).user_ip6[1]).write_volatile(to.address[1]);
                (&raw mut (*user).user_ip6[2]).write_volatile(to.address[2]);
                (&raw mut (*user).user_ip6[3]).write_volatile(to.address[3]);
            }
        }
        (&raw mut (*user).user_port).write_volatile(to.port.into());
    }
}

/// The kernel's number of a socket, which no other socket gets until the machine restarts.
#[inline(always)]
pub(super) fn cookie(context: &impl EbpfContext) -> u64 {
    // SAFETY: the context is valid, and the helper only reads it.
    unsafe { bpf_get_socket_cookie(context.as_ptr()) }
}

#[inline(always)]
pub(super) fn is_connected(context: &SockAddrContext) -> bool {
    const ESTABLISHED: u32 = 1;
    // SAFETY: the kernel gives every program of this type a valid context with a socket in it.
    unsafe {
        let socket = (*context.sock_addr).__bindgen_anon_1.sk;
        !socket.is_null() && (&raw const (*socket).state).read_volatile() == ESTABLISHED
    }
}

/// True for a bound socket, and for a UDP socket that has sent or was connected before.
#[inline(always)]
pub(super) fn has_port(context: &SockAddrContext) -> bool {
    // SAFETY: as in `is_connected`.
    unsafe {
        let socket = (*context.sock_addr).__bindgen_anon_1.sk;
        !socket.is_null() && (&raw const (*socket).src_port).read_volatile() != 0
    }
}

#[inline(always)]
pub(super) fn protocol(context: &SockAddrContext) -> u32 {
    // SAFETY: as in `address`.
    unsafe { (*context.sock_addr).protocol }
}

/// The client that a socket belongs to.
#[derive(Clone, Copy)]
pub(super) struct Client {
    /// The cookie of the network namespace.
    pub(super) namespace: u64,
    /// Whether this is the host's network namespace.
    pub(super) host: bool,
}

/// Reads the client; `None` if weir leaves its pod's sockets alone.
#[inline(always)]
pub(super) fn client(context: &SockAddrContext) -> Option<Client> {
    if SETTINGS.get(Settings::PODS)?.bypassed != 0 && is_bypassed() {
        return None;
    }
    let settings = SETTINGS.get(Settings::PLANE)?;
    // SAFETY: the context is valid, and the helper only reads it.
    let namespace = unsafe { bpf_get_netns_cookie(context.as_ptr()) };
    Some(Client { namespace, host: namespace == host(settings.host) })
}

/// The cookie of the host's network namespace: the one in `settings`, or else the initial namespace's.
#[inline(always)]
pub(super) fn host(cookie: u64) -> u64 {
    if cookie != 0 {
        return cookie;
    }
    // SAFETY: without a context the helper returns the initial namespace's cookie.
    unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
}

/// The most levels of cgroups to look at, from the root: a container of a pod is at level four, and below a
/// container that acts as a node there are some more.
const LEVELS: i32 = 16;

/// Whether the process is in a cgroup of `bypassed`, or below one.
#[inline(always)]
fn is_bypassed() -> bool {
    for level in 1..LEVELS {
        // SAFETY: the helper takes any level, and returns 0 beyond the last one.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return false;
        }
        if BYPASSED.get_ptr(id).is_some() {
            return true;
        }
    }
    false
}

/// Whether a socket in the client's own network namespace, a pod's, is bound to exactly this address. A
/// packet to it would not leave that namespace, so no proxy on the node would see it. A socket lookup costs
/// as much as all the rest, so it is done only if the namespace may have a socket that is bound to a
/// Service's address.
#[inline(always)]
pub(super) fn pod_listens_on(
    context: &SockAddrContext,
    client: Client,
    protocol: u32,
    to: &Endpoint,
) -> bool {
    if client.host || !home::may_have_any(client.namespace) {
        return false;
    }
    // Nothing is zeroed, because that becomes a call of `memset`, byte by byte. The source is one that no
    // client has: no socket is connected to port 0, and the kernel finds listening sockets without it.
    let (v4, v6);
    let (tuple, size): (*const u32, usize) = if is_v4(&to.address) {
        v4 = Ipv4Tuple { saddr: 0, daddr: to.address[3], sport: 0, dport: to.port };
        ((&raw const v4).cast(), size_of::<Ipv4Tuple>())
    } else {
        v6 = Ipv6Tuple { saddr: to.address, daddr: to.address, sport: 0, dport: to.port };
        ((&raw const v6).cast(), size_of::<Ipv6Tuple>())
    };
    const OWN_NAMESPACE: u64 = u64::MAX;
    let (context, tuple, size) = (context.as_ptr(), tuple.cast_mut().cast::<bpf_sock_tuple>(), size as u32);
    // SAFETY: the context is the hook's, the tuple has the given size, and a socket that is found is released
    // below.
    unsafe {
        let found = match protocol {
            TCP => bpf_sk_lookup_tcp(context, tuple, size, OWN_NAMESPACE, 0),
            _ => bpf_sk_lookup_udp(context, tuple, size, OWN_NAMESPACE, 0),
        };
        if found.is_null() {
            return false;
        }
        // Volatile, because the verifier accepts only single words of a socket's address.
        let bound = if is_v4(&to.address) {
            (&raw const (*found).src_ip4).read_volatile() == to.address[3]
        } else {
            (&raw const (*found).src_ip6[0]).read_volatile() == to.address[0]
                && (&raw const (*found).src_ip6[1]).read_volatile() == to.address[1]
                && (&raw const (*found).src_ip6[2]).read_volatile() == to.address[2]
                && (&raw const (*found).src_ip6[3]).read_volatile() == to.address[3]
        };
        bpf_sk_release(found.cast());
        bound
    }
}
