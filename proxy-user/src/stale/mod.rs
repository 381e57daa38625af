//! Traffic that outlives its backend.
//!
//! In: each delta once it is in force. Out: UDP flows deleted from connection tracking (`flows`), and sockets closed or moved
//! to another backend (`sockets`). Both work on threads of their own, because a sweep must not hold up the next change.

pub mod flows;
pub mod sockets;
