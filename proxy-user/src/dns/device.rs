//! The device that makes addresses local to this node for as long as this process lives.
//!
//! In: addresses to claim and to release. Out: local routes to them. The device is a TUN device without persistence.
//! When the process ends or is killed, the kernel closes its descriptors and removes the device with all routes
//! through it. So a packet rule that checks whether such an address is local always knows whether this process lives.
//! No packet ever goes through the device, because the kernel delivers packets for a local address to sockets.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder, new_connection,
    packet_route::{
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute},
        route::{RouteMessage, RouteScope, RouteType},
    },
};
use tokio_tun::Tun;

use super::tun::TunError;

pub(super) const DEVICE: &str = "weir-dns";

/// The kernel's routing table of local addresses.
const LOCAL_TABLE: u32 = 255;

/// Why weir could not claim or release an address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The kernel did not create the device.
    #[error("cannot create the device `{DEVICE}`")]
    Open(#[source] TunError),
    /// The kernel gave no netlink socket.
    #[error("cannot open rtnetlink")]
    Netlink(#[source] io::Error),
    /// The kernel refused a change.
    #[error("cannot {0}")]
    Refused(String, #[source] rtnetlink::Error),
    /// The host has the address without weir.
    #[error("{0} is already an address of this host; weir leaves it to the program that answers there")]
    Taken(IpAddr),
}

/// The device, and the addresses that have routes through it.
pub(super) struct Device {
    tun: Tun,
    index: u32,
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    claimed: BTreeSet<IpAddr>,
}

impl Device {
    /// Creates the device in the network namespace of this thread. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or another process has the device.
    pub(super) async fn open() -> Result<Self, DeviceError> {
        let devices = Tun::builder().name(DEVICE).build().map_err(unopened)?;
        let none = || DeviceError::Netlink(io::ErrorKind::NotFound.into());
        let tun = devices.into_iter().next().ok_or_else(none)?;
        let index = tun.index().map_err(unopened)?;
        let (connection, handle, _) = new_connection().map_err(DeviceError::Netlink)?;
        let connection = tokio::spawn(connection);
        // Without this the device gets an IPv6 link-local address, which would serve NodePorts. /proc/sys is no
        // alternative, because it is often read-only in containers and systemd units. The request fails on kernels
        // without IPv6, where there is no such address.
        let without = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let bare = LinkUnspec::new_with_index(index);
        let bare = bare.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![without])).build();
        if let Err(error) = handle.link().set(bare).execute().await {
            tracing::debug!(%error, "cannot keep the kernel from giving the device an IPv6 address");
        }
        let device = Self { tun, index, handle, connection, claimed: BTreeSet::new() };
        device.set_up().await?;
        Ok(device)
    }

    /// Whether the kernel still has the device, which another program may have deleted. Other errors of the check,
    /// such as no free descriptor, do not mean that the device is gone.
    #[must_use]
    pub(super) fn is_there(&self) -> bool {
        match self.tun.index() {
            Ok(index) => index == self.index,
            Err(tokio_tun::Error::IoError(error)) => error.raw_os_error() != Some(libc::ENODEV),
            Err(_) => true,
        }
    }

    /// Adds routes again that another program has removed, as network managers do with unknown routes. Returns their
    /// addresses. If the kernel refuses a route, its address is no longer claimed.
    ///
    /// # Errors
    ///
    /// The error of the last address that the kernel refused.
    pub(super) async fn restore(&mut self) -> (Vec<IpAddr>, Result<(), DeviceError>) {
        let (mut restored, mut result) = (Vec::new(), Ok(()));
        for address in self.claimed.clone() {
            match self.add(address).await {
                Ok(true) => restored.push(address),
                Ok(false) => {}
                Err(error) => {
                    self.claimed.remove(&address);
                    result = Err(error);
                }
            }
        }
        (restored, result)
    }

    /// Adds the route of an address; false if it exists. The request is exclusive, so it does not change an existing
    /// route, and the kernel notifies no listener.
    async fn add(&self, address: IpAddr) -> Result<bool, DeviceError> {
        let add = || self.handle.route().add(self.route(address, source_towards(address))).execute();
        let mut added = add().await;
        if is(&added, libc::ENETDOWN) || is(&added, libc::ENETUNREACH) {
            self.set_up().await?;
            added = add().await;
        }
        if is(&added, libc::EEXIST) {
            return Ok(false);
        }
        added.map_err(|error| DeviceError::Refused(format!("route {address} to this host"), error))?;
        Ok(true)
    }

    async fn set_up(&self) -> Result<(), DeviceError> {
        let up = LinkUnspec::new_with_index(self.index).up().build();
        let set = self.handle.link().set(up).execute().await;
        set.map_err(|source| DeviceError::Refused(format!("set `{DEVICE}` up"), source))
    }

    #[must_use]
    pub(super) fn claimed(&self) -> &BTreeSet<IpAddr> {
        &self.claimed
    }

    /// Makes an address local to this node. Packets of the host to it keep the source address that they had before.
    ///
    /// # Errors
    ///
    /// When the host has the address without weir, or the kernel refuses.
    pub(super) async fn claim(&mut self, address: IpAddr) -> Result<(), DeviceError> {
        let source = source_towards(address);
        if source == Some(address) {
            return Err(DeviceError::Taken(address));
        }
        let add = self.handle.route().add(self.route(address, source)).replace().execute().await;
        add.map_err(|error| DeviceError::Refused(format!("route {address} to this host"), error))?;
        self.claimed.insert(address);
        Ok(())
    }

    /// Removes the route of an address. A route that is already gone is a success.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) async fn release(&mut self, address: IpAddr) -> Result<(), DeviceError> {
        if !self.claimed.remove(&address) {
            return Ok(());
        }
        let removed = self.handle.route().del(self.route(address, None)).execute().await;
        if is(&removed, libc::ESRCH) {
            return Ok(());
        }
        removed.map_err(|error| DeviceError::Refused(format!("give {address} back"), error))
    }

    fn route(&self, address: IpAddr, source: Option<IpAddr>) -> RouteMessage {
        match (address, source) {
            (IpAddr::V4(address), source) => {
                let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                    .destination_prefix(address, 32)
                    .output_interface(self.index)
                    .table_id(LOCAL_TABLE)
                    .kind(RouteType::Local)
                    .scope(RouteScope::Host);
                match source {
                    Some(IpAddr::V4(source)) => route.pref_source(source).build(),
                    _ => route.build(),
                }
            }
            (IpAddr::V6(address), source) => {
                let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                    .destination_prefix(address, 128)
                    .output_interface(self.index)
                    .table_id(LOCAL_TABLE)
                    .kind(RouteType::Local);
                match source {
                    Some(IpAddr::V6(source)) => route.pref_source(source).build(),
                    _ => route.build(),
                }
            }
        }
    }
}

fn unopened(error: tokio_tun::Error) -> DeviceError {
    DeviceError::Open(TunError::making(error))
}

/// Whether the kernel refused with this error.
fn is(result: &Result<(), rtnetlink::Error>, code: i32) -> bool {
    matches!(result, Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -code)
}

impl Drop for Device {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The source address of this host's packets to an address; the address itself if the host has it.
fn source_towards(address: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Connecting a UDP socket sends nothing; it only looks up the route.
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect((address, 53)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|source| !source.is_loopback())
}
