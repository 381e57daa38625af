//! Listens for changes that other programs make to weir's tables.
//!
//! In: the kernel's notices of commits. Out: for each commit that changed weir's tables, their families and the new
//! generation of the rule set, so that the engine can ignore news of a change that it has read back since.
//!
//! The kernel sends the notices of one commit in several datagrams, with the generation in the last one. So a change is
//! reported only with that one.

use std::io;

use mnl::{Bus, Socket};

use super::socket::{BUFFER, close_on_exec, header};
use crate::sys::libnftnl;
use crate::{
    model::{Family, PerFamily},
    sys::descriptor::{OwnSocket, borrow, ignore_sender},
};

/// The socket's buffer, in bytes: room for the notices of a commit that replaces 100,000 rules at once, as iptables
/// does. The kernel drops notices beyond it, and then weir must compare everything. Only waiting notices take memory.
const ROOM: usize = 64 << 20;

/// A change that a [`Watch`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A commit of another program changed weir's tables.
    Foreign {
        /// The families of the changed tables.
        families: PerFamily<bool>,
        /// The generation of the rule set after the commit.
        generation: u32,
    },
    /// The kernel dropped notices, so any table may have changed.
    Lost {
        /// The families of tables that certainly changed.
        families: PerFamily<bool>,
    },
}

/// Counts of foreign changes, from which the engine sees how many it has not handled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// For each family the number of changes, and the generation after the last one if it is known.
    pub touched: PerFamily<(u64, Option<u32>)>,
    /// The number of times that the kernel dropped notices.
    pub lost: u64,
}

impl News {
    /// Counts one report.
    pub fn take_in(&mut self, seen: Seen) {
        let (families, generation) = match seen {
            Seen::Foreign { families, generation } => (families, Some(generation)),
            Seen::Lost { families } => {
                self.lost += 1;
                (families, None)
            }
        };
        for family in Family::ALL.into_iter().filter(|family| *families.get(*family)) {
            let (times, _) = *self.touched.get(family);
            *self.touched.get_mut(family) = (times + 1, generation);
        }
    }
}

/// A socket that receives the kernel's notices.
pub struct Watch {
    socket: OwnSocket,
    buffer: Vec<u8>,
    ours: u32,
    /// The families of which notices of the current commit have come in.
    touched: PerFamily<bool>,
}

impl Watch {
    /// Listens for changes that do not come from the socket `ours`.
    ///
    /// # Errors
    ///
    /// When the socket cannot be opened or may not join the group.
    pub(super) fn open(ours: u32) -> io::Result<Self> {
        use nix::sys::socket::{setsockopt, sockopt};
        const NFNLGRP_NFTABLES: u32 = 7;
        let socket = Socket::open(Bus::Netfilter)?;
        close_on_exec(&socket)?;
        socket.bind(1 << (NFNLGRP_NFTABLES - 1), mnl::mnl_sys::MNL_SOCKET_AUTOPID)?;
        setsockopt(&borrow(&socket), sockopt::RcvBufForce, &ROOM)?;
        ignore_sender(&socket, ours)?;
        let touched = PerFamily::default();
        Ok(Self { socket: OwnSocket(socket), buffer: vec![0; BUFFER], ours, touched })
    }

    /// Opens a new socket after the old one failed. Changes in between are not reported.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the subscription.
    pub fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(self.ours)?;
        Ok(())
    }

    /// Waits until another program has changed weir's tables.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn wait(&mut self) -> io::Result<Seen> {
        loop {
            let len = match self.socket.0.recv_raw(&mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Seen::Lost { families: std::mem::take(&mut self.touched) });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut seen = None;
            for message in mnl::NlMessages::new(&self.buffer[..len]) {
                match read(message?, self.ours) {
                    Some(Notice::Touched(family)) => *self.touched.get_mut(family) = true,
                    Some(Notice::Committed(generation)) => {
                        let families = std::mem::take(&mut self.touched);
                        if families.v4 || families.v6 {
                            seen = Some(Seen::Foreign { families, generation });
                        }
                    }
                    None => {}
                }
            }
            if let Some(seen) = seen {
                return Ok(seen);
            }
        }
    }
}

enum Notice {
    /// An object of weir's table in this family changed.
    Touched(Family),
    /// The commit is complete, and this is the new generation.
    Committed(u32),
}

/// Reads a message about a commit of another program. The first attribute of every nf_tables object names its table.
fn read(message: &[u8], ours: u32) -> Option<Notice> {
    const FAMILY: usize = 16;
    const FIRST_ATTRIBUTE: usize = FAMILY + 4;
    let sender = u32::from_ne_bytes([message[12], message[13], message[14], message[15]]);
    if sender == ours {
        return None;
    }
    if header(message).0 & 0xff == libnftnl::NEW_GENERATION {
        return libnftnl::parse_generation(message).map(Notice::Committed);
    }
    let attribute = message.get(FIRST_ATTRIBUTE..FIRST_ATTRIBUTE + 4)?;
    let len = usize::from(u16::from_ne_bytes([attribute[0], attribute[1]]));
    let name = message.get(FIRST_ATTRIBUTE + 4..FIRST_ATTRIBUTE + len.max(4)).unwrap_or_default();
    if name.split(|&byte| byte == 0).next() != Some(super::schema::TABLE.as_bytes()) {
        return None;
    }
    match i32::from(*message.get(FAMILY)?) {
        libc::NFPROTO_IPV4 => Some(Notice::Touched(Family::V4)),
        libc::NFPROTO_IPV6 => Some(Notice::Touched(Family::V6)),
        _ => None,
    }
}
