//! Whether this process may make a TUN device, and what to do where it may not.
//!
//! In: nothing. Out: the reason with its remedy. Opening the file makes no device.

use std::{fs::OpenOptions, io};

/// Where the kernel makes TUN devices.
pub(super) const TUN: &str = "/dev/net/tun";

/// Why there can be no TUN device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// There is no such file.
    #[error("{TUN} does not exist: `modprobe tun` creates it on the node, and a container has to mount it")]
    Missing(#[source] io::Error),
    /// There is the file and nothing behind it.
    #[error("the kernel has no driver for {TUN}: `modprobe tun` loads it")]
    NoDriver(#[source] io::Error),
    /// The file may not be opened.
    #[error(
        "{TUN} may not be opened: the container runtime has to allow the device c 10:200, as runc does except from 1.2.0 to \
         1.2.3, or the container has to be privileged; under systemd the unit needs DeviceAllow={TUN}"
    )]
    NotAllowed(#[source] io::Error),
    /// It may be opened, and no device be made.
    #[error(
        "creating a device with {TUN} needs the capability NET_ADMIN, and a name that no other process uses"
    )]
    NoDevice(#[source] io::Error),
}

impl TunError {
    /// Why the file could not be opened.
    fn opening(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::Missing(error),
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => Self::NotAllowed(error),
            _ => Self::NoDriver(error),
        }
    }

    /// Why a device could not be made.
    pub(super) fn making(error: tokio_tun::Error) -> Self {
        match openable() {
            Err(opening) => opening,
            Ok(()) => Self::NoDevice(match error {
                tokio_tun::Error::IoError(error) => error,
                tokio_tun::Error::NixError(error) => error.into(),
            }),
        }
    }
}

/// Whether the file can be opened.
///
/// # Errors
///
/// With what to do about it.
pub fn openable() -> Result<(), TunError> {
    OpenOptions::new().read(true).write(true).open(TUN).map(drop).map_err(TunError::opening)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_remedy() {
        for (code, remedy) in [
            (libc::ENOENT, "`modprobe tun` creates it on the node, and a container has to mount it"),
            (libc::ENODEV, "`modprobe tun` loads"),
            (libc::ENXIO, "`modprobe tun` loads"),
            (libc::EPERM, "the container runtime has to allow the device c 10:200"),
            (libc::EACCES, "the container runtime has to allow the device c 10:200"),
        ] {
            let error = TunError::opening(io::Error::from_raw_os_error(code));
            assert!(error.to_string().contains(remedy) && error.to_string().contains(TUN), "{code}: {error}");
        }
    }
}
