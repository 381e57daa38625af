//! The socket options by which iptables' legacy variant, whose tables are outside nf_tables, is read and written.
//!
//! In: an option and bytes as `linux/netfilter/x_tables.h` and `linux/netfilter_ipv4/ip_tables.h` lay them out, for IPv6
//! alike. Out: the same.

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

/// Where `struct ipt_replace` has the address of the counters.
const ADDRESS: usize = 88;
/// How long `struct ipt_replace` is before its entries.
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

    /// Puts `struct ipt_replace` and the entries behind it in force at one instant. The entries that were there count no
    /// more; what they had counted is in `counters`, one for each.
    pub(crate) fn replace(&self, replace: &mut [u8], counters: &mut [Counters]) -> io::Result<()> {
        let told = replace.get(ADDRESS - 4..ADDRESS).and_then(|count| count.first_chunk::<4>());
        let fits = told.is_some_and(|count| u32::from_ne_bytes(*count) as usize == counters.len());
        let address = (counters.as_mut_ptr().expose_provenance() as u64).to_ne_bytes();
        match replace.get_mut(ADDRESS..REPLACE_LEN) {
            Some(place) if fits => place.copy_from_slice(&address),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        // SAFETY: the kernel writes as many counters as `replace` says, which are as many as `counters` has.
        unsafe { self.set(REPLACE, replace) }
    }

    /// Adds what `struct xt_counters_info` says to the counters of a table.
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
    /// What the kernel finds addresses of in `value`, it may write to.
    unsafe fn set(&self, option: libc::c_int, value: &[u8]) -> io::Result<()> {
        // SAFETY: the kernel reads `value`, whose length it is told; the rest is the caller's promise.
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
