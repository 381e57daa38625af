//! Listens for what other programs change in our tables.
//!
//! In: the kernel's notices of commits. Out: for each commit that touched our tables, which ones and the generation of the
//! rule set that it made, so that news of what was read back since can be told from news.
//!
//! The notices of one commit come in several datagrams, and the one that tells the generation comes last: only that one is
//! passed on.

use std::io;

use mnl::{Bus, Socket};

use super::{
    netlink,
    socket::{BUFFER, close_on_exec, header},
};
use crate::{
    model::{Family, PerFamily},
    sys::descriptor::{OwnSocket, borrow, ignore_sender},
};

/// Room for the notices of a commit of others that replaces 100,000 rules at once, as iptables does: what finds no room is
/// lost, and then everything has to be compared. Only what waits takes memory.
const ROOM: usize = 64 << 20;

/// What a [`Watch`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A commit of another program changed our tables.
    Foreign {
        /// In these families.
        families: PerFamily<bool>,
        /// What the generation of the rule set was then.
        generation: u32,
    },
    /// More happened than could be followed; our tables may have been touched, and those of these families were.
    Lost {
        /// In these families something was seen.
        families: PerFamily<bool>,
    },
}

/// The newest that is known of foreign changes, with as much as was missed while it was not looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// For each family, how often it was touched and what the generation was the last time, if that is known.
    pub touched: PerFamily<(u64, Option<u32>)>,
    /// How often more happened than could be followed.
    pub lost: u64,
}

impl News {
    /// Adds what was seen.
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

/// Listens for changes that another program makes to our tables.
pub struct Watch {
    socket: OwnSocket,
    buffer: Vec<u8>,
    ours: u32,
    /// What the commit touches of which notices come in.
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

    /// Listens anew, after the socket failed. What happened meanwhile is not known.
    ///
    /// # Errors
    ///
    /// As when it was opened.
    pub fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(self.ours)?;
        Ok(())
    }

    /// Waits until another program has changed our tables.
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

/// What one message says.
enum Notice {
    /// Something of our table in this family changed.
    Touched(Family),
    /// The commit is through, and made this generation.
    Committed(u32),
}

/// What a message of another program says of our tables. Every nf_tables object names its table in its first attribute.
fn read(message: &[u8], ours: u32) -> Option<Notice> {
    const FAMILY: usize = 16;
    const FIRST_ATTRIBUTE: usize = FAMILY + 4;
    let sender = u32::from_ne_bytes([message[12], message[13], message[14], message[15]]);
    if sender == ours {
        return None;
    }
    if header(message).0 & 0xff == netlink::NEW_GENERATION {
        return netlink::parse_generation(message).map(Notice::Committed);
    }
    let attribute = message.get(FIRST_ATTRIBUTE..FIRST_ATTRIBUTE + 4)?;
    let len = usize::from(u16::from_ne_bytes([attribute[0], attribute[1]]));
    let name = message.get(FIRST_ATTRIBUTE + 4..FIRST_ATTRIBUTE + len.max(4)).unwrap_or_default();
    if name.split(|&byte| byte == 0).next() != Some(super::ruleset::TABLE.as_bytes()) {
        return None;
    }
    match i32::from(*message.get(FAMILY)?) {
        libc::NFPROTO_IPV4 => Some(Notice::Touched(Family::V4)),
        libc::NFPROTO_IPV6 => Some(Notice::Touched(Family::V6)),
        _ => None,
    }
}
