//! tests

pub mod apiserver;
