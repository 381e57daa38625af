//! The kernel programs. Built for the host too, as an empty program, so that the whole workspace builds, lints and
//! tests with one command; `proxy-user/build.rs` builds it for the kernel.

#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        macros::{cgroup_sock_addr, map},
        maps::PerCpuArray,
        programs::SockAddrContext,
    };

    /// Connections seen by the socket hook, one counter a CPU.
    #[map]
    static CONNECTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

    const ALLOW: i32 = 1;

    /// Counts IPv4 connects and lets every one of them pass unchanged.
    #[cgroup_sock_addr(connect4)]
    fn connect4(_: SockAddrContext) -> i32 {
        if let Some(count) = CONNECTS.get_ptr_mut(0) {
            // SAFETY: the pointer is to this CPU's own slot of a per-CPU array, and the program is not re-entered
            // on the CPU while it runs.
            unsafe { *count += 1 };
        }
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
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
