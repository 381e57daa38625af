//! The socket options that read and write the tables of legacy iptables, which are outside nf_tables.
//!
//! In: an option, and bytes in the layout of `linux/netfilter/x_tables.h` and `linux/netfilter_ipv4/ip_tables.h`, which is
//! the same for IPv6. Out: bytes in that layout.

use std::{io, os::fd::AsRawFd as _};

use nftnl::nftnl_sys::libc;
use socket2::{Domain, Socket, Type};

use crate::model::Family;

/// `IPT_SO_SET_REPLACE`.
const REPLACE: libc::c_int = 64;
/// `IPT_SO_SET_ADD_COUNTERS`.
const ADD_COUNTERS: libc::c_int = 65;
/// `IPT_SO_GET_INFO`.
const GET_INFO: libc::c_int = 64;
/// `IPT_SO_GET_ENTRIES`.
const GET_ENTRIES: libc::c_int = 65;

/// The offset of the counters' address in `struct ipt_replace`.
const ADDRESS: usize = 88;
/// The length of `struct ipt_replace` without its entries.
pub(crate) const REPLACE_LEN: usize = 96;

/// Packets and bytes that a rule matched, `struct xt_counters`.
pub(crate) type Counters = [u64; 2];

/// The tables of one family in the network namespace they were opened in.
pub(crate) struct Xtables {
    socket: Socket,
    level: libc::c_int,
}

impl Xtables {
    pub(crate) fn open(family: Family) -> io::Result<Self> {
        let (domain, level) = match family {
            Family::V4 => (Domain::IPV4, libc::SOL_IP),
            Family::V6 => (Domain::IPV6, libc::SOL_IPV6),
        };
        Ok(Self { socket: Socket::new(domain, Type::DGRAM, None)?, level })
    }

    /// Fills in `struct ipt_getinfo`, which begins with the table's name.
    pub(crate) fn info(&self, info: &mut [u8]) -> io::Result<()> {
        self.get(GET_INFO, info)
    }

    /// Fills in `struct ipt_get_entries`, which begins with the table's name and the size of its entries.
    pub(crate) fn entries(&self, entries: &mut [u8]) -> io::Result<()> {
        self.get(GET_ENTRIES, entries)
    }

    /// Puts `struct ipt_replace` and the entries after it in force at one instant. The old entries stop counting, and
    /// `counters` receives their counts.
    pub(crate) fn replace(&self, replace: &mut [u8], counters: &mut [Counters]) -> io::Result<()> {
        let count = replace.get(ADDRESS - 4..ADDRESS).and_then(|count| count.first_chunk::<4>());
        let fits = count.is_some_and(|count| u32::from_ne_bytes(*count) as usize == counters.len());
        let address = (counters.as_mut_ptr().expose_provenance() as u64).to_ne_bytes();
        match replace.get_mut(ADDRESS..REPLACE_LEN) {
            Some(place) if fits => place.copy_from_slice(&address),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        // SAFETY: the kernel writes as many counters as `replace` names, and `counters` has as many.
        unsafe { self.set(REPLACE, replace) }
    }

    /// Adds the counts in `struct xt_counters_info` to the counters of a table.
    pub(crate) fn add_counters(&self, counters: &[u8]) -> io::Result<()> {
        // SAFETY: the structure has no addresses in it.
        unsafe { self.set(ADD_COUNTERS, counters) }
    }

    fn get(&self, option: libc::c_int, value: &mut [u8]) -> io::Result<()> {
        let mut length = value.len() as libc::socklen_t;
        // SAFETY: the kernel writes `length` bytes at most, and `value` has so many.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                self.level,
                option,
                value.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// # Safety
    ///
    /// The kernel may write to the memory at addresses in `value`.
    unsafe fn set(&self, option: libc::c_int, value: &[u8]) -> io::Result<()> {
        // SAFETY: the kernel reads `value` up to the length in the call; the caller promises the rest.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                self.level,
                option,
                value.as_ptr().cast(),
                value.len() as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
