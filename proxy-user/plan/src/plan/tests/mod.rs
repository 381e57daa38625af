//! Tests of plans and deltas, by rule.

mod applied;
mod conflicts;
mod endpoints;
mod matrix;
mod names;
mod node;
mod planner;
mod services;
