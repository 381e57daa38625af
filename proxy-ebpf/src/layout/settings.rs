//! `settings`: facts about the node that the programs need.
//!
//! In: nothing. Out: the map's values and indices.

/// Value of `settings`. Two writers in the agent have an entry each: [`Settings::PLANE`] and [`Settings::PODS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The cookie of the host's network namespace; 0 means the initial one.
    pub host: u64,
    /// [`crate::SERVICES_VERSION`].
    pub layout: u32,
    /// The number of entries in `bypassed`; the programs do not look into that map while this is 0.
    pub bypassed: u32,
    /// The id of the cgroup that the programs are attached to.
    pub cgroup: u64,
}

impl Settings {
    /// The entry of the socket plane: every field but `bypassed`.
    pub const PLANE: u32 = 0;
    /// The entry of the opt-out of pods: `bypassed`.
    pub const PODS: u32 = 1;
}

const _: () = assert!(size_of::<Settings>() == 24);
