//! Socket options that need the descriptor itself.
//!
//! In: a netlink socket. Out: a descriptor for safe calls, and a filter on what the socket hears.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use nftnl::nftnl_sys::libc;

/// A netlink socket that may move to another thread.
pub(in crate::dataplane::nftables) struct OwnSocket(pub(in crate::dataplane::nftables) mnl::Socket);

// SAFETY: libmnl's socket is a descriptor and an address, with no ties to the thread that made it, and only its owner
// reaches it.
unsafe impl Send for OwnSocket {}

/// The descriptor of a socket, for socket options.
pub(in crate::dataplane::nftables) fn borrow(socket: &mnl::Socket) -> BorrowedFd<'_> {
    // SAFETY: the socket keeps its descriptor open for as long as it lives, and the result lives no longer.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// Lets a listening socket take no events that the socket `sender` caused: our own large changes would fill it.
///
/// # Errors
///
/// When the kernel refuses the filter.
pub(in crate::dataplane::nftables) fn ignore_sender(
    socket: &mnl::Socket,
    sender: u32,
) -> std::io::Result<()> {
    const SENDER_OFFSET: u32 = 12;
    let statement = |code: u32, jt, k| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    // The load converts from network byte order; netlink headers are in the host's.
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, SENDER_OFFSET),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, sender.to_be()),
        statement(libc::BPF_RET | libc::BPF_K, 0, u32::MAX),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the descriptor is open; `program` and the four statements it points to live until the call returns, and
    // the kernel copies them.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
