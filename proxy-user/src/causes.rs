//! An error and its causes in one line.
//!
//! In: an error. Out: its text and the texts of its causes. A text that is already there is left out, because
//! some errors repeat the text of their cause, and the verifier's message, which is such a cause, is long.

use std::error::Error;

/// The text of an error, followed by the texts of its causes that it does not contain yet.
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
