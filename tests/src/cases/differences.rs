//! Where weir, or its eBPF plane alone, differs from the kube-proxy that the table is proven right on, and why: rules, each
//! of which holds for whatever it fits. Everything else that differs is a failure.
//!
//! In: a subject, and a client on its way to a target. Out: whether the client's own socket leads it there, and the
//! [`Difference`]s that hold.

use std::fmt;

use super::{Address, Target};
use crate::{
    node::Location,
    objects::Shape,
    subject::{Kind, Plane},
    traffic::Transport,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// R5 to R7, R9: no client is masqueraded.
    OwnAddress,
    /// R15: NodePorts are on every address by default.
    EveryAddress,
    /// R13: NodePorts are on loopback addresses.
    Loopback,
    /// R18: they are where that is asked for, as for a later kube-proxy.
    AskedLoopback,
    /// Answers outside the window end where they would not be translated back.
    OutOfWindow,
    /// F1: unconnected UDP sockets get the error from the call itself.
    AtOnce,
    /// K6, K7: UDP flows end where no Service leads them any more.
    Ended,
    /// R9: endpoints that name no node may be here.
    Unplaced,
}

impl Difference {
    /// Whether a subject differs so.
    #[must_use]
    pub fn is_of(self, kind: Kind) -> bool {
        match self {
            Self::AskedLoopback | Self::Ended | Self::OutOfWindow | Self::Unplaced => {
                matches!(kind, Kind::Weir(_))
            }
            _ => kind == Kind::Weir(Plane::Ebpf),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnAddress => {
                "backends see the address of a client on the node or in a pod: its socket leads it to the backend, \
                 and there is no packet left to masquerade (R5 R6 R7 R9)"
            }
            Self::EveryAddress => {
                "without nodePortAddresses NodePorts answer on every address of the node, as those of kube-proxy's \
                 default mode do (R15)"
            }
            Self::Loopback => {
                "NodePorts answer the node's processes on its loopback addresses, which sockets can be led away from \
                 and packets cannot (R13)"
            }
            Self::AskedLoopback => {
                "NodePorts answer the node's processes on loopback addresses where nodePortAddresses names these, by TCP \
                 and UDP; kube-proxy does so since 1.38, by TCP (R18)"
            }
            Self::OutOfWindow => {
                "an answer that connection tracking finds outside the window reaches no client, as with kube-proxy's \
                 iptables mode; its nftables mode passes it on with the backend's address"
            }
            Self::AtOnce => "an unconnected UDP socket is refused by the call itself (F1)",
            Self::Unplaced => {
                "a pod reaches itself through its Service also where its slice names no node, as in slices written by \
                 hand (R9)"
            }
            Self::Ended => {
                "UDP flows end when no endpoint serves them, when their Service, its address or its port goes, and \
                 when their client may not come any more; kube-proxy ends those of the first kind since 1.37, and \
                 those of a Service that goes since 1.38 (K6 K7)"
            }
        })
    }
}

/// Whether a client's socket is connected to its backend, so that no packet to the target ever exists. All
/// else goes by packets, as everywhere: other transports, source ranges (F7), and the NodePorts of other
/// nodes.
#[must_use]
pub fn at_socket(kind: Kind, shape: &Shape, from: Location, to: Target, transport: Transport) -> bool {
    let (Location::Host(node) | Location::Pod(node, _)) = from else { return false };
    let reached = match to.address {
        Address::Cluster | Address::External => true,
        Address::Balancer => shape.source_ranges.is_empty(),
        Address::Node(other) | Address::SecondNode(other) => other == node,
        Address::Loopback => matches!(from, Location::Host(_)),
        Address::UnusedCluster => false,
    };
    let by_socket = matches!(transport, Transport::Tcp | Transport::Udp | Transport::Datagram);
    kind == Kind::Weir(Plane::Ebpf) && reached && by_socket
}
