//! The suites that need root: one program, so that a change is linked once. `cargo xtask test` runs it once for each suite, in a
//! process of its own.
//!
//! `xtask/src/suites` reads the names of the suites below; README.md has a line for each.

mod api_objects;

mod suites {
    mod agents;
    mod apiserver;
    mod bypass;
    mod calls;
    mod chaos;
    mod conntrack;
    mod dns;
    mod dropin;
    mod ebpf;
    mod events;
    mod harness;
    mod histories;
    mod host;
    mod listing;
    mod nftables;
    mod node;
    mod oracle;
    mod outages;
    mod prepare;
    mod probe;
    mod races;
    mod restart;
    mod scenarios;
    mod sockets;
    mod source;
    mod takeover;
    mod watching;
}
