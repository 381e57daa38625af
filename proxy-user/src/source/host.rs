//! This host's own addresses, followed through rtnetlink.
//!
//! In: the kernel's addresses and the news about them. Out: the current list on a channel, for the model to find the
//! NodePort addresses in (R13, R14).

use std::{collections::BTreeSet, io, net::IpAddr, time::Duration};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_route::address::{AddressAttribute, AddressMessage},
};
use tokio::sync::watch;
use tracing::{debug, warn};

/// The addresses that [`watch`] keeps; empty until it has read them once.
pub type Addresses = watch::Receiver<Vec<IpAddr>>;

/// How long to wait before a broken connection to the kernel is made anew.
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

/// Keeps `tx` at the addresses on this host's interfaces, sorted, without loopback ones: the whole list when it starts,
/// then again whenever it is different. Needs a tokio runtime and means the network namespace of the thread that first
/// polls it. Failures are logged and retried, and leave the last list in place; ends when nobody listens any more.
pub async fn watch(tx: watch::Sender<Vec<IpAddr>>) {
    let mut first = true;
    loop {
        tokio::select! {
            () = tx.closed() => return,
            result = follow(&tx, &mut first) => {
                if let Err(error) = result {
                    warn!(error = &error as &dyn std::error::Error, "lost sight of this host's addresses");
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
        // What the news says does not matter, lost news (ENOBUFS, seen as an overrun message) least of all: the list
        // is read again, once for all that has arrived.
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

/// The host's side of an address; `Address` alone would be the far side on point-to-point links.
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

/// The task of a connection ends with the one who talks through it.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
