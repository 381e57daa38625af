//! Whether this process may create a TUN device, and what to do if it may not.
//!
//! In: nothing. Out: the reason with its remedy. Opening the file creates no device.

use std::{fs::OpenOptions, io};

/// The file through which the kernel creates TUN devices.
pub(super) const TUN: &str = "/dev/net/tun";

/// Why weir cannot create a TUN device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The file does not exist.
    #[error("{TUN} does not exist: `modprobe tun` creates it on the node, and a container has to mount it")]
    Missing(#[source] io::Error),
    /// The file exists, and the kernel has no driver for it.
    #[error("the kernel has no driver for {TUN}: `modprobe tun` loads it")]
    NoDriver(#[source] io::Error),
    /// This process may not open the file.
    #[error(
        "{TUN} may not be opened: the container runtime has to allow the device c 10:200, as runc does except from 1.2.0 to \
         1.2.3, or the container has to be privileged; under systemd the unit needs DeviceAllow={TUN}"
    )]
    NotAllowed(#[source] io::Error),
    /// The file can be opened, and the kernel creates no device.
    #[error(
        "creating a device with {TUN} needs the capability NET_ADMIN, and a name that no other process uses"
    )]
    NoDevice(#[source] io::Error),
}

impl TunError {
    /// From an error of opening the file.
    fn opening(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::Missing(error),
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => Self::NotAllowed(error),
            _ => Self::NoDriver(error),
        }
    }

    /// From an error of creating the device.
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

/// Checks that the file can be opened.
///
/// # Errors
///
/// The error names the remedy.
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
