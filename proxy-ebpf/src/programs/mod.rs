//! The hooks.
//!
//! In: a call of a process, as the kernel describes it to the hook. Out: the same call with a backend's
//! address in the place of a Service's, or the reverse, or a refusal. Each hook has one function for each
//! family; both do the same.

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};

mod account;
mod bind;
mod flows;
mod home;
mod made;
mod maps;
mod resolve;
mod reverse;
mod search;
mod seats;
mod socket;
mod trace;
mod translate;

use socket::Family;

/// The return value of a hook that lets the call continue.
const ALLOW: i32 = 1;

macro_rules! hooks {
    ($($hook:ident, $attach:ident, $family:ident, $work:path;)+) => {
        $(
            #[doc = concat!("The hook `", stringify!($attach), "`.")]
            #[cgroup_sock_addr($attach)]
            fn $hook(context: SockAddrContext) -> i32 {
                $work(&context, Family::$family)
            }
        )+
    };
}

hooks! {
    connect4, connect4, V4, translate::connect;
    connect6, connect6, V6, translate::connect;
    sendmsg4, sendmsg4, V4, translate::send;
    sendmsg6, sendmsg6, V6, translate::send;
    recvmsg4, recvmsg4, V4, reverse::receive;
    recvmsg6, recvmsg6, V6, reverse::receive;
    getpeername4, getpeername4, V4, reverse::peer;
    getpeername6, getpeername6, V6, reverse::peer;
}

#[cgroup_sock(post_bind4)]
fn post_bind4(context: SockContext) -> i32 {
    bind::bound(&context, Family::V4)
}

#[cgroup_sock(post_bind6)]
fn post_bind6(context: SockContext) -> i32 {
    bind::bound(&context, Family::V6)
}

#[cgroup_sock(sock_create)]
fn sock_create(context: SockContext) -> i32 {
    made::record(&context);
    ALLOW
}

#[cgroup_sock(sock_release)]
fn sock_release(context: SockContext) -> i32 {
    seats::remove(&context);
    flows::release(&context);
    home::uncount(&context);
    ALLOW
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel offers some helpers only to programs with a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
