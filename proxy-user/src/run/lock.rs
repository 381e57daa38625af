//! One agent a node, because two would overwrite each other's tables and maps.
//!
//! In: the network namespace, which is the node's. Out: a [`Lock`], or the process that holds it. The lock is an abstract Unix
//! socket: the kernel keeps its name for each network namespace, and frees it however the process ends.
//!
//! ```text
//! first agent ── bind "@weir-agent" ──▶ kernel ◀── bind: in use; connect: by process 4711 of root ── second agent
//! ```
//! Every process may bind such a name. Therefore a holder that runs neither as root nor as the agent's own user is ignored.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket,
        sockopt,
    },
    unistd::{Uid, getpid},
};

/// In the abstract namespace of Unix sockets.
const NAME: &[u8] = b"weir-agent";

/// The pause between two attempts to take the lock.
const AGAIN: Duration = Duration::from_millis(200);

/// The pause before another connect to a holder that has bound the name and does not listen yet.
const ATTEMPTS: usize = 5;

/// Held while this process is the agent of its network namespace.
#[derive(Debug)]
pub(super) struct Lock(Option<OwnedFd>);

/// The agent that holds the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    /// Its process id; none if that process is in another pid namespace.
    pub(super) process: Option<i32>,
}

#[derive(Debug)]
enum Taken {
    Yes(Lock),
    /// Another agent has it.
    By(Holder),
    /// The holder is no agent, or the kernel does not identify it.
    Useless(String),
}

impl Lock {
    /// Takes the lock. If another agent holds it, calls `waiting` once and waits for the end of that agent.
    pub(super) async fn take(waiting: impl FnOnce(Holder)) -> Self {
        let mut waiting = Some(waiting);
        loop {
            match Self::attempt(NAME) {
                Taken::Yes(lock) => return lock,
                Taken::By(holder) => {
                    if let Some(waiting) = waiting.take() {
                        waiting(holder);
                    }
                }
                Taken::Useless(why) => {
                    tracing::warn!(
                        why,
                        "weir runs without the lock, so a second agent could serve this node at the same time"
                    );
                    return Self(None);
                }
            }
            while !is_free(NAME) {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    /// Keeps the lock over `exec`.
    pub(super) fn keep_over_exec(self) {
        if let Some(socket) = self.0 {
            match fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty())) {
                // The socket lives as long as the process.
                Ok(_) => std::mem::forget(socket),
                Err(error) => tracing::debug!(%error, "weir will take the lock again after exec"),
            }
        }
    }

    fn attempt(name: &[u8]) -> Taken {
        match bound(name) {
            Ok(socket) => return Taken::Yes(Self(Some(socket))),
            Err(Errno::EADDRINUSE) => {}
            Err(error) => return Taken::Useless(format!("the kernel refuses the lock: {error}")),
        }
        match holder(name) {
            Ok((pid, _)) if pid == getpid().as_raw() => Taken::Yes(Self(None)),
            Ok((pid, uid)) if is_trusted(uid) => Taken::By(Holder::of(pid)),
            Ok((pid, uid)) => {
                Taken::Useless(format!("process {pid} of user {uid} holds the lock and is no agent"))
            }
            // The holder has just ended.
            Err(Errno::ECONNREFUSED) if is_free(name) => Self::attempt(name),
            Err(error) => Taken::Useless(format!("the process that holds the lock does not answer: {error}")),
        }
    }
}

impl Holder {
    fn of(pid: i32) -> Self {
        Self { process: (pid != 0).then_some(pid) }
    }

    /// The agent of this network namespace, if there is one.
    pub(super) fn of_this_node() -> Option<Self> {
        let (pid, uid) = holder(NAME).ok()?;
        is_trusted(uid).then(|| Self::of(pid))
    }
}

/// Whether weir accepts a process of this user as an agent.
fn is_trusted(user: Uid) -> bool {
    user.is_root() || user == Uid::effective()
}

fn unix_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// A bound and listening socket, so that another agent can read its process id.
fn bound(name: &[u8]) -> nix::Result<OwnedFd> {
    let socket = unix_socket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new_abstract(name)?)?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

fn is_free(name: &[u8]) -> bool {
    let address = UnixAddr::new_abstract(name);
    let bound = unix_socket().and_then(|socket| bind(socket.as_raw_fd(), &address?));
    bound != Err(Errno::EADDRINUSE)
}

/// The process id and the user id of the holder.
fn holder(name: &[u8]) -> nix::Result<(i32, Uid)> {
    let address = UnixAddr::new_abstract(name)?;
    let mut attempts = 0;
    loop {
        let socket = unix_socket()?;
        attempts += 1;
        match connect(socket.as_raw_fd(), &address) {
            Err(Errno::ECONNREFUSED) if attempts < ATTEMPTS && !is_free(name) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            connected => {
                connected?;
                let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
                return Ok((peer.pid(), Uid::from_raw(peer.uid())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(of: &str) -> Vec<u8> {
        format!("weir-test-{of}-{}", getpid()).into_bytes()
    }

    #[test]
    fn the_lock_is_free_again_when_its_holder_is_gone() {
        let name = name("free");
        let lock = Lock::attempt(&name);
        assert!(matches!(lock, Taken::Yes(Lock(Some(_)))), "{lock:?}");
        assert!(!is_free(&name));
        drop(lock);
        assert!(is_free(&name));
    }

    #[test]
    fn what_this_process_has_become_by_exec_still_holds_it() {
        let name = name("exec");
        let Taken::Yes(lock) = Lock::attempt(&name) else { panic!("it is taken") };
        lock.keep_over_exec();
        let again = Lock::attempt(&name);
        assert!(matches!(again, Taken::Yes(Lock(None))), "{again:?}");
        assert!(!is_free(&name));
    }

    #[test]
    fn a_process_that_only_has_the_name_keeps_no_agent_from_serving() {
        let name = name("mute");
        let socket = unix_socket().unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new_abstract(&name).unwrap()).unwrap();
        let taken = Lock::attempt(&name);
        assert!(matches!(taken, Taken::Useless(_)), "{taken:?}");
    }
}
