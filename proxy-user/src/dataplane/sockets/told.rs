//! What every socket on the machine was told by the kernel programs.
//!
//! In: the map `origins`. Out: its elements, each with the cookie of its socket. They are read by a program of our own,
//! because sock_diag has them for TCP sockets only, and so one read is enough for all network namespaces.

use std::{
    io::Read as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};

use aya::{
    Btf, EbpfLoader,
    programs::{Iter, ProgramFd},
};
use proxy_ebpf::{Told, system};

use super::{failed, judge::Led};
use crate::{dataplane::Error, model::Protocol};

/// The program that reads the map.
static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-origins"));

/// Reads the map.
pub(super) struct Origins {
    program: ProgramFd,
    map: OwnedFd,
}

impl Origins {
    pub(super) fn new(map: OwnedFd) -> Result<Self, Error> {
        Ok(Self { program: load().map_err(Error::Kernel)?, map })
    }

    /// Hands every socket that was led somewhere to `visit`, with its cookie.
    pub(super) fn read(&self, mut visit: impl FnMut(u64, Led)) -> Result<(), Error> {
        let reading = || failed("reading what sockets were told");
        let mut bytes = Vec::new();
        let mut file = system::iterate(self.program.as_fd(), self.map.as_fd()).map_err(reading())?;
        file.read_to_end(&mut bytes).map_err(reading())?;
        let (all, _) = bytes.as_chunks::<{ size_of::<Told>() }>();
        all.iter().filter_map(decode).for_each(|(cookie, led)| visit(cookie, led));
        Ok(())
    }
}

/// Loads the program, which also tells whether this kernel has what it needs.
pub(super) fn load() -> Result<ProgramFd, String> {
    let failed = |error: &dyn std::error::Error| {
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("this kernel does not tell what sockets were told (Linux 5.12 with BTF): {error}{cause}")
    };
    let btf = Btf::from_sys_fs().map_err(|error| failed(&error))?;
    let mut ebpf = EbpfLoader::new().btf(Some(&btf)).load(PROGRAM).map_err(|error| failed(&error))?;
    let program = ebpf.program_mut("origins").ok_or("the program `origins` is missing")?;
    let program: &mut Iter = program.try_into().map_err(|error| failed(&error))?;
    program.load("bpf_sk_storage_map", &btf).map_err(|error| failed(&error))?;
    let program = program.fd().map_err(|error| failed(&error))?;
    program.try_clone().map_err(|error| failed(&error))
}

/// The fields of a [`Told`], one after the other.
fn decode(bytes: &[u8; size_of::<Told>()]) -> Option<(u64, Led)> {
    let (cookie, rest) = bytes.split_first_chunk()?;
    let (since, rest) = rest.split_first_chunk()?;
    let (service, rest) = rest.split_first_chunk()?;
    let (backend, rest) = rest.split_first_chunk()?;
    let protocol = u32::from_ne_bytes(*rest.first_chunk()?);
    let led = Led {
        since: u64::from_ne_bytes(*since),
        protocol: Protocol::from_number(u8::try_from(protocol).ok()?)?,
        service: endpoint(service)?,
        backend: endpoint(backend)?,
    };
    Some((u64::from_ne_bytes(*cookie), led))
}

fn endpoint(bytes: &[u8; 20]) -> Option<SocketAddr> {
    let (address, rest) = bytes.split_first_chunk::<16>()?;
    let address: IpAddr = Ipv6Addr::from(*address).to_canonical();
    Some(SocketAddr::new(address, u16::from_be_bytes(*rest.first_chunk()?)))
}
