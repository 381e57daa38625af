//! The netlink socket: sends one batch and reads what became of it, and dumps.
//!
//! In: buffers from `netlink`. Out: success or the kernel's error, and dumped messages.

use std::{collections::HashMap, io, os::fd::AsRawFd as _};

use mnl::{Bus, Socket};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};

use crate::sys::descriptor::OwnSocket;

/// Large enough for the messages of one dump step, which the kernel keeps below 32 KiB, and for any error report.
pub(super) const BUFFER: usize = 1 << 16;

/// What the kernel counts for one report: an acknowledgement of a few bytes takes a whole buffer of its own.
const BYTES_A_REPORT: usize = 1024;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// A request socket.
pub(super) struct Netlink {
    socket: OwnSocket,
    buffer: Vec<u8>,
    sequence: u32,
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
        crate::sys::descriptor::report_briefly(&socket)?;
        Ok(Self { socket: OwnSocket(socket), buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// The address by which the kernel knows this socket; events caused by it carry it.
    pub(super) fn port(&self) -> u32 {
        self.socket.0.portid()
    }

    /// Sends one batch; it is in force when this returns, or nothing of it is.
    ///
    /// The kernel works on a batch while the sender waits, so all it has to say is there when `send` returns.
    ///
    /// # Errors
    ///
    /// The first error the kernel reported for the batch. `ENOBUFS` says that reports were lost.
    pub(super) fn commit(&mut self, batch: &[u8]) -> io::Result<()> {
        self.discard();
        let messages = mnl::NlMessages::new(batch).count();
        grow(&self.socket.0, batch.len(), messages * BYTES_A_REPORT)?;
        self.socket.0.send(batch)?;
        self.drain()
    }

    /// Sends a batch that is not to come into force; answers with the place of each message that the kernel refuses, and
    /// the error, in the order of the messages. Place 0 is the message behind the one that begins the batch.
    ///
    /// # Errors
    ///
    /// When the batch could not be sent, or `ENOBUFS` when reports were lost.
    pub(super) fn try_out(&mut self, batch: &[u8]) -> io::Result<Vec<(usize, io::Error)>> {
        self.discard();
        let mut places = HashMap::new();
        for (index, message) in mnl::NlMessages::new(batch).enumerate().skip(1) {
            places.insert(header(message?).2, index - 1);
        }
        grow(&self.socket.0, batch.len(), places.len() * BYTES_A_REPORT)?;
        self.socket.0.send(batch)?;
        let mut refused = Vec::new();
        self.reports(|sequence, error| refused.extend(places.get(&sequence).map(|place| (*place, error))))?;
        refused.sort_by_key(|(place, _)| *place);
        Ok(refused)
    }

    /// Forgets reports of earlier batches: after some were lost there may be more, and the loss itself is reported first.
    fn discard(&mut self) {
        const LOSS_AND_ERRORS: usize = 2;
        for _ in 0..LOSS_AND_ERRORS {
            let Err(error) = self.drain() else { return };
            tracing::debug!(%error, "a late report");
        }
    }

    /// Reads every report that is there, and returns the first error among them.
    fn drain(&mut self) -> io::Result<()> {
        let mut first = Ok(());
        self.reports(|_, error| {
            if first.is_ok() {
                first = Err(error);
            }
        })?;
        first
    }

    /// Reads every report that is there; `each` has the sequence number and the error of those that are no acknowledgement.
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

    /// The generation of the rule set, which every commit of any program raises by one.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn generation(&mut self) -> io::Result<u32> {
        let mut generation = None;
        self.ask(super::netlink::generation_request, |message| {
            generation = generation.or(super::netlink::parse_generation(message));
        })?;
        generation.ok_or_else(|| io::Error::other("the kernel tells no generation of the rule set"))
    }

    /// Sends a request made for `sequence` and gives every message of the answer to `each`. `each` may have seen
    /// messages already when an error comes back.
    ///
    /// # Errors
    ///
    /// `EINTR` when the table changed during a dump: ask again. `ENOENT` when there is nothing of that name.
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

/// libmnl opens sockets that the next program would inherit, and the agent may start anew in its own place.
pub(super) fn close_on_exec(socket: &Socket) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(crate::sys::descriptor::borrow(socket), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// Makes room for a batch in the send buffer and for its reports in the receive buffer. The kernel takes a message
/// only whole.
fn grow(socket: &Socket, batch: usize, reports: usize) -> io::Result<()> {
    use nix::sys::socket::{getsockopt, setsockopt, sockopt};
    let socket = crate::sys::descriptor::borrow(socket);
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
