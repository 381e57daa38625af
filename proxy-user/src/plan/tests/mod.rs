//! The plan's rules, case by case.

mod conflicts;
mod endpoints;
mod matrix;
mod node;
mod planner;
mod services;
