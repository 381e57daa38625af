//! The chart: its README, and checks of what it makes.

mod checks;
mod places;
mod readme;
mod rendered;

pub(crate) use checks::check;
pub(crate) use readme::{README, readme};
