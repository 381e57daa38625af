//! The hooks and what they have in common.
//!
//! In: what a socket is about to do, in the kernel's form of it. Out: the same with a Service's address exchanged for a
//! backend's, or the other way round, or a refusal. One function for each hook of each family; what they do is the same.

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
mod search;
mod seats;
mod socket;
mod tell;
mod told;
mod translate;

use socket::Family;

/// What a hook answers: go on.
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
    recvmsg4, recvmsg4, V4, told::receive;
    recvmsg6, recvmsg6, V6, told::receive;
    getpeername4, getpeername4, V4, told::peer;
    getpeername6, getpeername6, V6, told::peer;
}

/// The hook `post_bind4`.
#[cgroup_sock(post_bind4)]
fn post_bind4(context: SockContext) -> i32 {
    bind::bound(&context, Family::V4)
}

/// The hook `post_bind6`.
#[cgroup_sock(post_bind6)]
fn post_bind6(context: SockContext) -> i32 {
    bind::bound(&context, Family::V6)
}

/// The hook `sock_create`.
#[cgroup_sock(sock_create)]
fn sock_create(context: SockContext) -> i32 {
    made::note(&context);
    ALLOW
}

/// The hook `sock_release`.
#[cgroup_sock(sock_release)]
fn sock_release(context: SockContext) -> i32 {
    seats::forget(&context);
    flows::forget(&context);
    home::forget(&context);
    ALLOW
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel offers some helpers only to programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
