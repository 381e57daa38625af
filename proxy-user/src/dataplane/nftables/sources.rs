//! Lists of source ranges (F7), as they appear in names of sets and chains.
//!
//! In: the ranges that a frontend allows. Out: a name that is the same for the same list, and the elements of its set.
//! All frontends with the same list share one set, which never changes. So the cost of a change does not depend on the
//! ranges of other Services: the kernel would copy one set for all Services whole at each change.

use std::{
    cmp::Ordering,
    fmt::Write as _,
    hash::{Hash, Hasher},
    sync::Arc,
};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::schema::{address_bytes, split_address};
use crate::model::Family;
use crate::sys::libnftnl::{Bytes, Element, Value};

#[derive(Clone, Debug)]
pub(super) struct Sources {
    hash: Arc<str>,
    /// The ranges; none if weir read the list's name only.
    ranges: Arc<[IpNet]>,
}

impl Sources {
    pub(super) fn of(ranges: &Arc<[IpNet]>) -> Self {
        let mut digest = Sha256::new();
        for range in ranges.iter() {
            digest.update(format!("{range} "));
        }
        let mut hash = String::new();
        for byte in &digest.finalize()[..16] {
            let _ = write!(hash, "{byte:02x}");
        }
        Self { hash: hash.into(), ranges: Arc::clone(ranges) }
    }

    /// The list with this hash, without its ranges.
    pub(super) fn read(hash: &str) -> Option<Self> {
        let is_hash = hash.len() == 32 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hash.then(|| Self { hash: hash.into(), ranges: Arc::new([]) })
    }

    pub(super) fn hash(&self) -> &str {
        &self.hash
    }

    pub(super) fn elements(&self) -> Vec<Element> {
        let elements = self.ranges.iter().map(|range| Element {
            key: key(&address_bytes(range.network()), u16::MIN),
            key_end: Some(key(&address_bytes(range.broadcast()), u16::MAX)),
            value: Value::None,
        });
        elements.collect()
    }
}

/// An address and a port, of which the set allows every one, because the kernel's only set of ranges that packets look
/// up without a lock is for concatenations.
fn key(address: &[u8], port: u16) -> Bytes {
    let mut key = Bytes::from_slice(address);
    key.extend_from_slice(&port.to_be_bytes());
    key.extend_from_slice(&[0; 2]);
    key
}

/// The range of an element.
pub(super) fn range_of(family: Family, element: &Element) -> Option<IpNet> {
    let (first, _) = split_address(family, &element.key)?;
    let (last, _) = split_address(family, element.key_end.as_ref()?)?;
    network_of(first, last)
}

/// The network with this first and last address.
fn network_of(first: std::net::IpAddr, last: std::net::IpAddr) -> Option<IpNet> {
    let longest = if first.is_ipv4() { 32 } else { 128 };
    (0..=longest).find_map(|prefix| {
        let net = IpNet::new(first, prefix).ok()?;
        (net.network() == first && net.broadcast() == last).then_some(net)
    })
}

impl PartialEq for Sources {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl Eq for Sources {}

impl Hash for Sources {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hash.hash(state);
    }
}

impl PartialOrd for Sources {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Sources {
    fn cmp(&self, other: &Self) -> Ordering {
        self.hash.cmp(&other.hash)
    }
}
