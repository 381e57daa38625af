//! Follows this host's own addresses through rtnetlink.
//!
//! In: rtnetlink's list of addresses, and its notifications. Out: the current list on a channel, from which
//! the model takes NodePort addresses (R13, R14).

use std::{collections::BTreeSet, io, net::IpAddr, time::Duration};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_route::address::{AddressAttribute, AddressMessage},
};
use tokio::sync::watch;
use tracing::{debug, warn};

/// The addresses that [`watch()`] sends; empty until it has read them once.
pub type Addresses = watch::Receiver<Vec<IpAddr>>;

/// The delay before a lost rtnetlink connection is opened again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot listen to rtnetlink")]
    Open(#[from] io::Error),
    #[error("cannot list addresses")]
    List(#[from] rtnetlink::Error),
    #[error("rtnetlink closed the connection")]
    Closed,
}

/// Keeps `tx` up to date with the addresses on this host's interfaces, sorted, without loopback ones. Sends
/// the list at the start and whenever it changes. Needs a tokio runtime, and reads the network namespace of
/// the thread that first polls it. A failure is logged and retried, and the last list stays. Ends when all
/// receivers are dropped.
pub async fn watch(tx: watch::Sender<Vec<IpAddr>>) {
    let mut first = true;
    loop {
        tokio::select! {
            () = tx.closed() => return,
            result = follow(&tx, &mut first) => {
                if let Err(error) = result {
                    warn!(error = &error as &dyn std::error::Error, "cannot follow this host's addresses; trying again");
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(tx: &watch::Sender<Vec<IpAddr>>, first: &mut bool) -> Result<(), Error> {
    let (connection, handle, mut news) =
        new_multicast_connection(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])?;
    let connection = tokio::spawn(connection);
    let _abort = AbortOnDrop(connection.abort_handle());
    loop {
        let addresses = list(&handle).await?;
        tx.send_if_modified(|current| {
            let changed = std::mem::take(first) || *current != addresses;
            if changed {
                debug!(?addresses, "this host's addresses");
                *current = addresses;
            }
            changed
        });
        // The content of a notification is not used, so a lost one (ENOBUFS, seen as an overrun message) does
        // no harm: the list is read again, once for all notifications that have arrived.
        news.next().await.ok_or(Error::Closed)?;
        while news.next().now_or_never().flatten().is_some() {}
    }
}

async fn list(handle: &Handle) -> Result<Vec<IpAddr>, rtnetlink::Error> {
    let mut addresses = BTreeSet::new();
    let mut messages = std::pin::pin!(handle.address().get().execute());
    while let Some(message) = messages.try_next().await? {
        addresses.extend(own_address(&message).filter(|address| !address.is_loopback()));
    }
    Ok(addresses.into_iter().collect())
}

/// The host's side of an address. On point-to-point links `Address` is the peer's side.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let find = |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Ends the task of a connection when its user is dropped.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
