//! Map keys and values as plain bytes, for the agent's side of the maps.

use crate::{
    Affinity, AffinityKey, Endpoint, FrontendKey, FrontendValue, Member, MemberKey, Origin, Record, Seat,
    Settings, Tally,
};

macro_rules! plain {
    ($($kind:ty),+) => {
        $(
            // SAFETY: `repr(C)` or `repr(transparent)` and integers only, without padding: any bytes are a value, and all bytes are initialised.
            unsafe impl aya::Pod for $kind {}
        )+
    };
}

plain!(
    FrontendKey,
    FrontendValue,
    Record,
    Endpoint,
    MemberKey,
    Member,
    AffinityKey,
    Affinity,
    Tally,
    Origin,
    Seat,
    Settings
);
