//! The maps: their names, how large they are, and what they hold.
//!
//! In: how many elements there have to be. Out: sizes, and the bytes of keys and values by which maps of another layout are
//! known.

use proxy_ebpf::{
    Affinity, AffinityKey, Crowd, Endpoint, Flows, FrontendKey, FrontendValue, Member, MemberKey, Origin,
    Record, Seat, Settings, Tally,
};

/// The maps that grow, and how many elements each has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) frontends: u32,
    /// Of `ports`, and of `tallies`.
    pub(super) ports: u32,
    pub(super) records: u32,
    pub(super) slots: u32,
    pub(super) members: u32,
    pub(super) affinities: u32,
}

impl Sizes {
    /// What a node without Services starts with.
    pub(super) const LEAST: Self =
        Self { frontends: 1024, ports: 512, records: 2048, slots: 1024, members: 256, affinities: 64 };

    /// By the names of the maps of Services.
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

    /// As large as maps are that are there.
    pub(super) fn found<E>(room: impl Fn(&'static str) -> Result<Option<u32>, E>) -> Result<Self, E> {
        let mut sizes = Self::LEAST;
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

    /// Room for `needed` and as much again where these sizes are too small; the same where they are not.
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

/// A map's name, and the bytes of its keys and values.
pub(super) type Shape = (&'static str, usize, usize);

/// The maps of Services.
pub(super) const SERVICES: [Shape; 7] = [
    ("frontends", size_of::<FrontendKey>(), size_of::<FrontendValue>()),
    ("ports", size_of::<u32>(), size_of::<u64>()),
    ("tallies", size_of::<u32>(), size_of::<Tally>()),
    ("records", size_of::<u32>(), size_of::<Record>()),
    ("slots", size_of::<u32>(), size_of::<Endpoint>()),
    ("members", size_of::<MemberKey>(), size_of::<Member>()),
    ("affinities", size_of::<AffinityKey>(), size_of::<Affinity>()),
];

/// The maps of sockets, which never grow.
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
