//! The plan's rules, case by case, and what must hold for any history.

mod conflicts;
mod endpoints;
mod histories;
mod matrix;
mod node;
mod planner;
mod services;
