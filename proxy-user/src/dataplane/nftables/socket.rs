//! The netlink socket: sends batches and requests, and reads the kernel's reports and answers.
//!
//! In: buffers from `sys::libnftnl`. Out: success or a [`CommitError`], and the messages of an answer.

use std::{collections::HashMap, io, os::fd::AsRawFd as _};

use mnl::{Bus, Socket};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};

use crate::sys::descriptor::{self, OwnSocket};
use crate::sys::libnftnl;

/// Large enough for the messages of one dump step, which the kernel keeps below 32 KiB, and for any error report.
pub(super) const BUFFER: usize = 1 << 16;

/// The kernel's charge for one report: an acknowledgement of a few bytes takes a whole buffer.
const BYTES_A_REPORT: usize = 1024;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;

pub(super) struct Netlink {
    socket: OwnSocket,
    buffer: Vec<u8>,
    sequence: u32,
}

/// Why a batch did not come into force, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    /// The kernel does not take something that the batch asks for.
    #[error(transparent)]
    Refused(io::Error),
    /// Something is missing that was there when the batch was made, because another program removed it.
    #[error(transparent)]
    Missing(io::Error),
    /// The error is about nothing in the batch: memory, rights or a lost report. Whether the batch is in force is
    /// unknown.
    #[error(transparent)]
    Unknown(io::Error),
}

impl CommitError {
    /// Whether something else is in a place that the batch wants to fill.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EBUSY)))
    }

    /// Whether the kernel may have refused a set or chain because one of another shape is in its place.
    pub(super) fn is_about_shape(&self) -> bool {
        use libc::{EBUSY, EEXIST, EINVAL, EOPNOTSUPP};
        let shape =
            |error: &io::Error| matches!(error.raw_os_error(), Some(EOPNOTSUPP | EEXIST | EINVAL | EBUSY));
        matches!(self, Self::Refused(error) if shape(error))
    }
}

impl From<io::Error> for CommitError {
    fn from(error: io::Error) -> Self {
        use libc::{EACCES, EAGAIN, EINTR, EMSGSIZE, ENOBUFS, ENOENT, ENOMEM, EPERM};
        match error.raw_os_error() {
            Some(ENOENT) => Self::Missing(error),
            Some(ENOMEM | EPERM | EACCES | ENOBUFS | EMSGSIZE | EAGAIN | EINTR) => Self::Unknown(error),
            _ => Self::Refused(error),
        }
    }
}

impl From<CommitError> for io::Error {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Refused(error) | CommitError::Missing(error) | CommitError::Unknown(error) => error,
        }
    }
}

/// Type, flags and sequence number of a message.
pub(super) fn header(message: &[u8]) -> (u16, u16, u32) {
    let short = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
    let sequence = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]);
    (short(4), short(6), sequence)
}

/// The error code of an error message, 0 for an acknowledgement.
fn error_code(message: &[u8]) -> i32 {
    message.get(16..20).map_or(0, |code| i32::from_ne_bytes([code[0], code[1], code[2], code[3]]))
}

impl Netlink {
    /// # Errors
    ///
    /// When the kernel has no nf_tables or this process may not use it.
    pub(super) fn open() -> io::Result<Self> {
        let socket = Socket::new(Bus::Netfilter)?;
        close_on_exec(&socket)?;
        descriptor::report_briefly(&socket)?;
        Ok(Self { socket: OwnSocket(socket), buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// The socket's address in netlink. The kernel's events carry the address of the socket that caused them.
    pub(super) fn port(&self) -> u32 {
        self.socket.0.portid()
    }

    /// Sends one batch. When this returns all of it is in force, or nothing.
    ///
    /// The kernel works on a batch while the sender waits, so all reports are there when `send` returns.
    ///
    /// # Errors
    ///
    /// The first error that the kernel reported for the batch.
    pub(super) fn commit(&mut self, batch: &[u8]) -> Result<(), CommitError> {
        self.discard();
        let messages = mnl::NlMessages::new(batch).count();
        grow(&self.socket.0, batch.len(), messages * BYTES_A_REPORT)?;
        self.socket.0.send(batch)?;
        Ok(self.drain()?)
    }

    /// Sends a batch that does not come into force. Returns the place of each message that the kernel refuses, and the
    /// error, in the order of the messages. Place 0 is the message after the one that begins the batch.
    ///
    /// # Errors
    ///
    /// When the batch could not be sent, or reports were lost.
    pub(super) fn try_out(&mut self, batch: &[u8]) -> Result<Vec<(usize, CommitError)>, CommitError> {
        self.discard();
        let mut places = HashMap::new();
        for (index, message) in mnl::NlMessages::new(batch).enumerate().skip(1) {
            places.insert(header(message?).2, index - 1);
        }
        grow(&self.socket.0, batch.len(), places.len() * BYTES_A_REPORT)?;
        self.socket.0.send(batch)?;
        let mut refused = Vec::new();
        self.reports(|sequence, error| {
            refused.extend(places.get(&sequence).map(|place| (*place, CommitError::from(error))));
        })?;
        refused.sort_by_key(|(place, _)| *place);
        Ok(refused)
    }

    /// Drops reports of earlier batches: after lost reports more may follow, and the kernel reports the loss first.
    fn discard(&mut self) {
        const LOSS_AND_ERRORS: usize = 2;
        for _ in 0..LOSS_AND_ERRORS {
            let Err(error) = self.drain() else { return };
            tracing::debug!(%error, "dropping a late report of the kernel");
        }
    }

    /// Reads every report that has arrived, and returns the first error among them.
    fn drain(&mut self) -> io::Result<()> {
        let mut first = Ok(());
        self.reports(|_, error| {
            if first.is_ok() {
                first = Err(error);
            }
        })?;
        first
    }

    /// Reads every report that has arrived, and passes sequence number and error of each failure to `each`.
    fn reports(&mut self, mut each: impl FnMut(u32, io::Error)) -> io::Result<()> {
        loop {
            let len = match recv(self.socket.0.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => len,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for message in mnl::NlMessages::new(&self.buffer[..len]) {
                let message = message?;
                let ((kind, _, sequence), code) = (header(message), error_code(message));
                if kind == NLMSG_ERROR && code != 0 {
                    each(sequence, io::Error::from_raw_os_error(-code));
                }
            }
        }
    }

    /// The generation of the rule set, which the kernel raises by one at every commit of any program.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn generation(&mut self) -> io::Result<u32> {
        let mut generation = None;
        self.ask(libnftnl::generation_request, |message| {
            generation = generation.or(libnftnl::parse_generation(message));
        })?;
        generation.ok_or_else(|| io::Error::other("the kernel reports no generation of the rule set"))
    }

    /// Sends the request that `request` makes for a sequence number, and passes every message of the answer to `each`,
    /// also those before an error.
    ///
    /// # Errors
    ///
    /// `EINTR` when the table changed during a dump: ask again. `ENOENT` when the object does not exist.
    pub(super) fn ask(
        &mut self,
        request: impl Fn(u32) -> Vec<u8>,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.discard();
        self.sequence += 1;
        self.socket.0.send(&request(self.sequence))?;
        let mut interrupted = false;
        loop {
            let len = self.socket.0.recv_raw(&mut self.buffer)?;
            for message in mnl::NlMessages::new(&self.buffer[..len]) {
                let message = message?;
                let (kind, flags, sequence) = header(message);
                if sequence != self.sequence {
                    continue;
                }
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
                match kind {
                    NLMSG_DONE if interrupted => return Err(Errno::EINTR.into()),
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match error_code(message) {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => each(message),
                }
            }
        }
    }
}

/// libmnl opens sockets that survive `exec`, by which the agent restarts itself.
pub(super) fn close_on_exec(socket: &Socket) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(descriptor::borrow(socket), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Enlarges the send buffer for a batch, because the kernel takes it only whole, and the receive buffer for its
/// reports.
fn grow(socket: &Socket, batch: usize, reports: usize) -> io::Result<()> {
    use nix::sys::socket::{getsockopt, setsockopt, sockopt};
    let socket = descriptor::borrow(socket);
    let needed = batch + (1 << 16);
    if getsockopt(&socket, sockopt::SndBuf)? < needed {
        setsockopt(&socket, sockopt::SndBufForce, &needed)?;
    }
    let reports = reports.max(1 << 20);
    if getsockopt(&socket, sockopt::RcvBuf)? < reports {
        setsockopt(&socket, sockopt::RcvBufForce, &reports)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_differ_by_what_the_caller_can_do() {
        let error = |code| CommitError::from(io::Error::from_raw_os_error(code));
        assert!(matches!(error(libc::ENOENT), CommitError::Missing(_)));
        for code in [libc::ENOBUFS, libc::ENOMEM, libc::EPERM, libc::EMSGSIZE] {
            assert!(matches!(error(code), CommitError::Unknown(_)), "{code}");
        }
        for code in [libc::EEXIST, libc::EBUSY] {
            assert!(error(code).is_conflict() && error(code).is_about_shape(), "{code}");
        }
        assert!(error(libc::EOPNOTSUPP).is_about_shape() && !error(libc::EOPNOTSUPP).is_conflict());
        assert!(!error(libc::ENOSPC).is_about_shape());
        let cause = io::Error::from(error(libc::EEXIST));
        assert_eq!(cause.raw_os_error(), Some(libc::EEXIST), "the cause stays");
    }
}
