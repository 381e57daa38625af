//! The plan's rules, case by case.

mod applied;
mod conflicts;
mod endpoints;
mod matrix;
mod names;
mod node;
mod planner;
mod services;
