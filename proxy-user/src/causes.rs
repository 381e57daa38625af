//! An error in one line, with all that led to it.
//!
//! In: an error. Out: its text and those of its causes, each once: some errors repeat theirs, and the verifier's message,
//! which is part of one, is long.

use std::error::Error;

/// The text of an error, followed by those of its causes that it does not hold already.
pub(crate) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}
