//! Reads the map `origins` out to the agent, which cannot walk sockets' own storage itself: sock_diag tells what it holds
//! for TCP sockets only.
//!
//! In: each socket with its value, from the kernel's iterator. Out: a [`proxy_ebpf::Told`] for each. An object of its own,
//! because it has no map and no hook.

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use core::ffi::c_void;

    use aya_ebpf::{
        bindings::seq_file,
        helpers::generated::{bpf_get_socket_cookie, bpf_seq_write},
    };
    use proxy_ebpf::{Origin, Told};

    /// `struct bpf_iter_meta`.
    #[repr(C)]
    struct Meta {
        output: *mut seq_file,
    }

    /// `struct bpf_iter__bpf_sk_storage_map`.
    #[repr(C)]
    struct Context {
        meta: *const Meta,
        map: *const c_void,
        socket: *mut c_void,
        value: *const Origin,
    }

    /// One element; at the end of the map once more, without a socket.
    #[unsafe(link_section = "iter/bpf_sk_storage_map")]
    #[unsafe(no_mangle)]
    extern "C" fn origins(context: *const Context) -> i32 {
        // SAFETY: the kernel calls this with its context, whose pointers are as the types say or null.
        unsafe {
            let (socket, value) = ((*context).socket, (*context).value);
            if socket.is_null() || value.is_null() {
                return 0;
            }
            let told = Told { cookie: bpf_get_socket_cookie(socket), origin: *value };
            // When there is no room the kernel notices, and comes back with the same socket.
            bpf_seq_write((*(*context).meta).output, (&raw const told).cast(), size_of::<Told>() as u32);
        }
        0
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    /// The kernel offers some helpers only to programs under a GPL-compatible licence.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
