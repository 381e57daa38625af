//! The device by which addresses are this node's for as long as this process lives.
//!
//! In: addresses to claim and to give back. Out: local routes to them. The device is a TUN device without persistence: when
//! the last descriptor of it is closed, and a killed process closes all, the kernel takes it away, and with it every
//! route that leads there. Whoever asks the kernel whether such an address is local therefore learns whether this
//! process is there, at the very moment of asking. No packet ever goes through the device: to a local address
//! they are delivered to sockets.

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

/// The device's name.
pub(super) const DEVICE: &str = "weir-dns";

/// The table of what is this host's own.
const LOCAL_TABLE: u32 = 255;

/// Why an address is not ours.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is no device.
    #[error("cannot create the device `{DEVICE}`")]
    Open(#[source] TunError),
    /// The kernel cannot be talked to.
    #[error("cannot open rtnetlink")]
    Netlink(#[source] io::Error),
    /// The kernel refused a change.
    #[error("cannot {0}")]
    Refused(String, #[source] rtnetlink::Error),
    /// The address is somebody else's on this host.
    #[error("{0} is already an address of this host; weir leaves it to the program that answers there")]
    Taken(IpAddr),
}

/// The device, and the addresses claimed by it.
pub(super) struct Device {
    tun: Tun,
    index: u32,
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    claimed: BTreeSet<IpAddr>,
}

impl Device {
    /// Makes the device in the network namespace of this thread. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or another process has the device.
    pub(super) async fn open() -> Result<Self, DeviceError> {
        let devices = Tun::builder().name(DEVICE).build().map_err(unmade)?;
        let none = || DeviceError::Netlink(io::ErrorKind::NotFound.into());
        let tun = devices.into_iter().next().ok_or_else(none)?;
        let index = tun.index().map_err(unmade)?;
        let (connection, handle, _) = new_connection().map_err(DeviceError::Netlink)?;
        let connection = tokio::spawn(connection);
        // Else it gets an address of its own, which would serve NodePorts. Not by /proc/sys, which containers and services
        // may only read. Without IPv6 there is nothing to prevent.
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

    /// Whether the kernel still has the device; another program may have deleted it. A process that has no descriptor left
    /// to ask with has not lost the device.
    #[must_use]
    pub(super) fn is_there(&self) -> bool {
        match self.tun.index() {
            Ok(index) => index == self.index,
            Err(tokio_tun::Error::IoError(error)) => error.raw_os_error() != Some(libc::ENODEV),
            Err(_) => true,
        }
    }

    /// Makes the routes anew that another program has removed, as network managers do with routes that they do not know;
    /// answers with their addresses. An address whose route the kernel refuses is claimed no longer.
    ///
    /// # Errors
    ///
    /// The kernel's, for the last address it refused.
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

    /// Adds the route of an address; false where it is there already. An exclusive request leaves such a route as it is,
    /// and the kernel tells no listener of routes about it.
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

    /// The addresses claimed.
    #[must_use]
    pub(super) fn claimed(&self) -> &BTreeSet<IpAddr> {
        &self.claimed
    }

    /// Makes an address this node's. What the host itself sends there has the source it would have without.
    ///
    /// # Errors
    ///
    /// When it is this host's by other means, or the kernel refuses.
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

    /// Gives an address back. One that is gone already is no failure.
    ///
    /// # Errors
    ///
    /// The kernel's.
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

fn unmade(error: tokio_tun::Error) -> DeviceError {
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

/// The source that this host gives to what it sends to an address: the address itself where that is its own.
fn source_towards(address: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Connecting sends nothing, it only looks for the way.
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect((address, 53)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|source| !source.is_loopback())
}
