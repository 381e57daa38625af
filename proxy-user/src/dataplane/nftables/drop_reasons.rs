//! The reasons for which the table drops or refuses packets.
//!
//! In: nothing. Out: a named counter for each reason, and the expressions and chains that end a packet's way. The
//! counters are in rules that drop or refuse only, because counting would cost traffic that is served. They belong to
//! the table, so they continue when rules are written anew.

use super::{expr, schema::RuledChain};
use crate::model::Family;
use crate::sys::libnftnl::Expr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DropReason {
    /// F1: refused, because the Service has no endpoint.
    NoEndpoints,
    /// F2, F3: dropped, because the policy wants local endpoints and there are none.
    NoLocalEndpoints,
    /// F7: dropped, because the Service does not allow the source.
    SourceNotAllowed,
    /// F4: refused, because the ClusterIP has no such port.
    UnknownPort,
    /// F5: dropped, because no Service has the address.
    UnallocatedAddress,
    /// Dropped, because the packet fits no connection, so connection tracking would not translate it back.
    OutOfWindow,
}

impl DropReason {
    pub(super) const ALL: [Self; 6] = [
        Self::NoEndpoints,
        Self::NoLocalEndpoints,
        Self::SourceNotAllowed,
        Self::UnknownPort,
        Self::UnallocatedAddress,
        Self::OutOfWindow,
    ];

    /// The counter's name, and the metric's label.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no-endpoints",
            Self::NoLocalEndpoints => "no-local-endpoints",
            Self::SourceNotAllowed => "source-not-allowed",
            Self::UnknownPort => "unknown-port",
            Self::UnallocatedAddress => "unallocated-address",
            Self::OutOfWindow => "out-of-window",
        }
    }

    /// Counts and drops.
    pub(super) fn drop(self) -> Vec<Expr> {
        vec![expr::count(self.name()), expr::drop()]
    }

    /// Counts and refuses.
    pub(super) fn reject(self, family: Family) -> Vec<Expr> {
        vec![expr::count(self.name()), expr::reject(family)]
    }
}

/// The chain for F2 and F3. Buckets lead to it because a verdict in a map cannot count.
pub(super) const NO_LOCAL_ENDPOINTS: &str = DropReason::NoLocalEndpoints.name();

pub(super) fn no_local_endpoints() -> RuledChain {
    RuledChain::regular(NO_LOCAL_ENDPOINTS, vec![DropReason::NoLocalEndpoints.drop()])
}

/// The chain for forwarded packets that belong to no known flow and begin no new one.
pub(super) const OUT_OF_WINDOW: &str = DropReason::OutOfWindow.name();

/// Drops TCP packets from and to pods that fit no connection, and accepts all others. Connection tracking does not
/// translate an answer outside the window, so the client would take it for a stranger's and reset its connection.
pub(super) fn out_of_window(of_pods: Vec<Vec<Expr>>) -> RuledChain {
    let drops = of_pods
        .into_iter()
        .map(|of_pods| [expr::fits_no_connection(), of_pods, DropReason::OutOfWindow.drop()].concat());
    RuledChain::regular(OUT_OF_WINDOW, drops.chain([vec![expr::accept()]]).collect())
}
