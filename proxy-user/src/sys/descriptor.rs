//! Socket options that need the descriptor itself.
//!
//! In: a netlink socket. Out: a descriptor for safe calls, and a filter on the messages that the socket receives.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use nftnl::nftnl_sys::libc;

/// A netlink socket that may move to another thread.
pub(crate) struct OwnSocket(pub(crate) mnl::Socket);

// SAFETY: libmnl's socket is a descriptor and an address, not bound to the thread that made it, and only its owner uses it.
unsafe impl Send for OwnSocket {}

/// The descriptor of a socket, for socket options.
pub(crate) fn borrow(socket: &mnl::Socket) -> BorrowedFd<'_> {
    // SAFETY: the socket keeps its descriptor open for as long as it lives, and the result lives no longer.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// Filters the events out that the socket `sender` caused, because weir's own large changes would fill a listening socket.
///
/// # Errors
///
/// When the kernel refuses the filter.
pub(crate) fn ignore_sender(socket: &mnl::Socket, sender: u32) -> std::io::Result<()> {
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
    // SAFETY: the array of the statements lives until the call returns.
    unsafe { set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program) }
}

/// Makes the kernel report an error without the message that caused it, because a batch may have many large messages.
///
/// # Errors
///
/// When the kernel does not know the option.
pub(crate) fn report_briefly(socket: &mnl::Socket) -> std::io::Result<()> {
    // SAFETY: the value is a number, no address.
    unsafe { set_option(socket, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &1 as &libc::c_int) }
}

/// # Safety
///
/// `value` has the option's type, and the memory to which it points lives until the call returns.
unsafe fn set_option<T>(
    socket: &mnl::Socket,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> std::io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel copies `length` bytes of `value`; the caller promises the rest.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
