//! Texts that names of subjects are made of.
//!
//! In: texts. Out: the same texts for as long as the process lives, each of them once.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

/// The text, kept for good. There are few: as many as the command line and the samples name binaries.
pub(super) fn kept(text: String) -> &'static str {
    static KEPT: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut all = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = all.get(text.as_str()) {
        return known;
    }
    let text: &'static str = Box::leak(text.into_boxed_str());
    all.insert(text);
    text
}
