//! Two planes for one plan: sockets in front, packets behind.
//!
//! In: [`Delta`]s. Out: the same delta, first to the packets' plane, then to the sockets' plane; a complete one, which
//! takes each its time, to both at once where that is asked for.
//!
//! The packets' plane has every frontend for every source. The sockets' plane has those a socket can decide about: TCP
//! and UDP, for pods and this host, without source ranges. What a socket does not translate becomes packets to the
//! Service's address, so whatever the sockets' plane lacks, refuses to take or does not know yet is served all the same:
//! traffic from outside, SCTP, pings, pods that opted out. So the packets come first, and a sockets' plane that fails
//! altogether is no outage. Nor does the sockets' plane need the other for what it has.

use super::{Dataplane, Error, Fill, State};
use crate::plan::{Delta, PortId};

/// A sockets' plane in front of a packets' plane.
pub struct Stack<P, S> {
    packets: P,
    sockets: S,
    at_once: bool,
}

impl<P: Dataplane, S: Dataplane> Stack<P, S> {
    /// Puts `sockets` in front of `packets`.
    pub fn new(packets: P, sockets: S) -> Self {
        Self { packets, sockets, at_once: false }
    }

    /// Has both planes take in a complete delta at once: for sockets' planes that serve, not for one that retires when
    /// the packets' plane serves alone.
    pub fn at_once(self) -> Self {
        Self { at_once: true, ..self }
    }

    /// The packets' plane.
    pub fn packets(&mut self) -> &mut P {
        &mut self.packets
    }

    /// The sockets' plane.
    pub fn sockets(&mut self) -> &mut S {
        &mut self.sockets
    }
}

impl<P: Dataplane, S: Dataplane + Send> Dataplane for Stack<P, S> {
    fn apply(&mut self, delta: &Delta) -> Result<(), Error> {
        let Self { packets, sockets, at_once } = self;
        let results = if *at_once && delta.complete {
            std::thread::scope(|scope| {
                let sockets = scope.spawn(|| sockets.apply(delta));
                let packets = packets.apply(delta);
                [packets, sockets.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))]
            })
        } else {
            [packets.apply(delta), sockets.apply(delta)]
        };
        let mut failed: Vec<(PortId, String)> = Vec::new();
        for result in results {
            match result {
                Ok(()) => {}
                Err(Error::Ports(ports)) => {
                    for (id, problem) in ports {
                        if !failed.iter().any(|(known, _)| *known == id) {
                            failed.push((id, problem));
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(Error::Ports(failed)) }
    }

    fn reread(&mut self) -> Result<(), Error> {
        self.packets.reread()?;
        self.sockets.reread()
    }

    /// The packets' plane, which has everything.
    fn dump(&mut self) -> Result<State, Error> {
        self.packets.dump()
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.sockets.remove()?;
        self.packets.remove()
    }

    fn fill(&self) -> Vec<Fill> {
        [self.packets.fill(), self.sockets.fill()].concat()
    }
}
