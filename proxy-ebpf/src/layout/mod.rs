//! Keys and values of the maps.
//!
//! In: nothing. Out: types without padding that the compiler could leave unset, because the kernel compares keys by
//! their bytes. Each file asserts the sizes of its types.

mod address;
mod affinity;
mod counter;
mod flow;
mod frontend;
mod home;
mod member;
mod origin;
mod record;
mod settings;

pub use address::{Address, Endpoint, wire};
pub use affinity::{Affinity, AffinityKey, namespace};
pub use counter::{Tally, trouble};
pub use flow::{Crowd, FEW, Flow, Flows, MANY};
pub use frontend::{FrontendKey, FrontendValue, kind};
pub use home::{HOMES, home_index};
pub use member::{Member, MemberKey};
pub use origin::{MADE, Origin, SEATS, Seat};
pub use record::{Column, Record, Slots, flag, set, verdict};
pub use settings::Settings;
