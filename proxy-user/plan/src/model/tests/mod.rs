//! The model's rules, case by case.

mod node;
mod services;
mod slices;
