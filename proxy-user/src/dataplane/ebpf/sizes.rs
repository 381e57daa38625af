//! The maps: their names, their sizes, and the sizes of their keys and values.
//!
//! In: the number of entries needed. Out: sizes of maps, and the sizes of keys and values by which weir
//! recognizes maps of another layout.

use proxy_ebpf::{
    Affinity, AffinityKey, Crowd, Endpoint, Flows, FrontendKey, FrontendValue, Member, MemberKey, Origin,
    Record, Seat, Settings, Tally,
};

/// The number of entries that each map has room for, of the maps that grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) frontends: u32,
    /// Of `ports` and `tallies`.
    pub(super) ports: u32,
    pub(super) records: u32,
    pub(super) slots: u32,
    pub(super) members: u32,
    pub(super) affinities: u32,
}

impl Sizes {
    /// The sizes on a node without Services.
    pub(super) const MIN: Self =
        Self { frontends: 1024, ports: 512, records: 2048, slots: 1024, members: 256, affinities: 64 };

    /// The sizes by the names of the maps.
    pub(super) fn named(&self) -> [(&'static str, u32); 7] {
        [
            ("frontends", self.frontends),
            ("ports", self.ports),
            ("tallies", self.ports),
            ("records", self.records),
            ("slots", self.slots),
            ("members", self.members),
            ("affinities", self.affinities),
        ]
    }

    /// The sizes of existing maps; the minimum for those that do not exist.
    pub(super) fn found<E>(room: impl Fn(&'static str) -> Result<Option<u32>, E>) -> Result<Self, E> {
        let mut sizes = Self::MIN;
        for (name, size) in [
            ("frontends", &mut sizes.frontends),
            ("ports", &mut sizes.ports),
            ("records", &mut sizes.records),
            ("slots", &mut sizes.slots),
            ("members", &mut sizes.members),
            ("affinities", &mut sizes.affinities),
        ] {
            if let Some(found) = room(name)? {
                *size = found;
            }
        }
        Ok(sizes)
    }

    /// At least twice `needed` for each map that is too small; the same size for the others.
    pub(super) fn grown_to(&self, needed: &Self) -> Self {
        let grow = |have: u32, need: u32| {
            if need <= have {
                have
            } else {
                need.saturating_mul(2).checked_next_power_of_two().unwrap_or(u32::MAX)
            }
        };
        Self {
            frontends: grow(self.frontends, needed.frontends),
            ports: grow(self.ports, needed.ports),
            records: grow(self.records, needed.records),
            slots: grow(self.slots, needed.slots),
            members: grow(self.members, needed.members),
            affinities: grow(self.affinities, needed.affinities),
        }
    }
}

/// A map's name, and the sizes of its keys and values in bytes.
pub(super) type Shape = (&'static str, usize, usize);

pub(super) const SERVICES: [Shape; 7] = [
    ("frontends", size_of::<FrontendKey>(), size_of::<FrontendValue>()),
    ("ports", size_of::<u32>(), size_of::<u64>()),
    ("tallies", size_of::<u32>(), size_of::<Tally>()),
    ("records", size_of::<u32>(), size_of::<Record>()),
    ("slots", size_of::<u32>(), size_of::<Endpoint>()),
    ("members", size_of::<MemberKey>(), size_of::<Member>()),
    ("affinities", size_of::<AffinityKey>(), size_of::<Affinity>()),
];

/// They never grow.
pub(super) const SOCKETS: [Shape; 12] = [
    ("settings", size_of::<u32>(), size_of::<Settings>()),
    ("troubles", size_of::<u32>(), size_of::<u64>()),
    ("bypassed", size_of::<u64>(), size_of::<u32>()),
    ("homes", size_of::<u32>(), size_of::<u64>()),
    ("early_homes", size_of::<u32>(), size_of::<u64>()),
    ("bound", size_of::<u32>(), size_of::<u64>()),
    ("made", size_of::<u32>(), size_of::<u64>()),
    ("origins", size_of::<u64>(), size_of::<Origin>()),
    ("seats", size_of::<u32>(), size_of::<Seat>()),
    ("flows", size_of::<u32>(), size_of::<Flows>()),
    ("crowds", size_of::<u32>(), size_of::<Crowd>()),
    ("accounts", size_of::<u32>(), size_of::<u64>()),
];
